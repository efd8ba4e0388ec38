// The reward itself. Put your own in place of the arithmetic; nothing here knows of gRPC.
#pragma once

#include <string_view>

namespace example {

inline constexpr std::string_view kName = "answer";
// Change it with every change that could change a score: trainers pin it for a run.
inline constexpr std::string_view kVersion = "1";
inline constexpr std::string_view kRequiredColumn = "answer";

// What a completion is worth, in parts.
struct Reward {
  double match;
  double format;
  double length;

  // The order of the additions is part of the rules.
  double Value() const { return (match + format) + length; }
};

// Does the completion give the reference answer, end like a sentence, and keep short? Both are UTF-8.
Reward RewardOf(std::string_view completion, std::string_view reference);

}  // namespace example
