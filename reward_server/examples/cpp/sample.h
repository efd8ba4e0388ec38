// What a sample says, as far as the reward needs it, and why some can't be judged.
#pragma once

#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "rlhf/reward/v1/reward.pb.h"

namespace example {

// The json_metadata_keys of a call.
using JsonKeys = std::set<std::string, std::less<>>;

// The sample can never be judged; becomes its FAILED outcome.
class Unjudgeable : public std::runtime_error {
 public:
  Unjudgeable(std::string code, const std::string& message) : std::runtime_error(message), code_(std::move(code)) {}

  const std::string& code() const { return code_; }

 private:
  std::string code_;
};

// Throws Unjudgeable for a fault that has nothing to do with which reward it is.
void Check(const rlhf::reward::v1::Sample& sample, const JsonKeys& json_keys);

// The text that `column` stands for. Throws Unjudgeable where the row has no value.
std::string ReferenceAnswer(const rlhf::reward::v1::Sample& sample, std::string_view column, const JsonKeys& json_keys);

// A digest of all that may change a score: the sample without its group, and which of its columns are JSON.
std::string Fingerprint(const rlhf::reward::v1::Sample& sample, const JsonKeys& json_keys);

// The beginning of `text`, at most `size` bytes of whole code points: for messages, which must stay short and UTF-8.
std::string_view Head(std::string_view text, std::size_t size = 64);

}  // namespace example
