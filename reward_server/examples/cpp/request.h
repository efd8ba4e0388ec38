// What a Score request must be; reward.proto says so at each field.
#pragma once

#include <string>
#include <vector>

#include "rlhf/reward/v1/reward.pb.h"

namespace example {

inline constexpr int kMaxSamples = 256;
// Enough to see the pattern: a status above about 8 KB would not reach the client.
inline constexpr std::size_t kMaxViolations = 8;

// A wrong field, by its path in the request, and what is wrong with it.
struct Violation {
  std::string field;
  std::string description;
};

// The wrong fields of the request, in order, the first kMaxViolations of them.
std::vector<Violation> Violations(const rlhf::reward::v1::ScoreRequest& request);

}  // namespace example
