#include "reward.h"

#include <algorithm>

namespace example {
namespace {

// isspace() takes two more for white space, and others in some locales; the rules name four.
constexpr std::string_view kWhiteSpace = " \t\n\r";
constexpr std::string_view kMarks = ".!?";
constexpr double kFreeLength = 64;
constexpr double kPenaltySpan = 256;

std::string_view Trim(std::string_view text) {
  const auto first = text.find_first_not_of(kWhiteSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kWhiteSpace) - first + 1);
}

// Every code point has one byte that is not 10xxxxxx; size() would count the others, too.
double CodePoints(std::string_view utf8) {
  return static_cast<double>(std::ranges::count_if(utf8, [](unsigned char byte) { return (byte & 0xC0) != 0x80; }));
}

}  // namespace

Reward RewardOf(std::string_view completion, std::string_view reference) {
  const std::string_view text = Trim(completion);
  const bool marked = !text.empty() && kMarks.find(text.back()) != std::string_view::npos;
  const std::string_view answer = marked ? Trim(text.substr(0, text.size() - 1)) : text;
  return {
      .match = answer == Trim(reference) ? 1.0 : 0.0,
      .format = marked ? 0.25 : 0.0,
      .length = -std::min(1.0, std::max(0.0, CodePoints(completion) - kFreeLength) / kPenaltySpan),
  };
}

}  // namespace example
