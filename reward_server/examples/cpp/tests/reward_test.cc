#include "reward.h"

#include <gtest/gtest.h>

#include <string>

namespace example {
namespace {

struct Verdict {
  std::string completion;
  std::string reference;
  double match;
  double format;
};

TEST(RewardTest, TheAnswerIsTheTrimmedTextWithoutOneEndingMark) {
  for (const auto& [completion, reference, match, format] :
       {Verdict{"42", "42", 1, 0}, Verdict{" 42 .\n", "\t42\r\n", 1, 0.25}, Verdict{"42..", "42.", 1, 0.25},
        Verdict{"42..", "42", 0, 0.25}, Verdict{".", "", 1, 0.25}, Verdict{"", "", 1, 0},
        Verdict{"42.\u00a0", "42", 0, 0}, Verdict{"caf\u00e9", "cafe\u0301", 0, 0}}) {
    SCOPED_TRACE(completion);
    const Reward reward = RewardOf(completion, reference);
    EXPECT_EQ(reward.match, match);
    EXPECT_EQ(reward.format, format);
    EXPECT_EQ(reward.length, 0.0);
    EXPECT_EQ(reward.Value(), match + format);
  }
}

TEST(RewardTest, EveryCodePointAbove64CostsUntilTheLimit) {
  for (const std::string character : {"a", "\u00e9", "\U0001f600", " "}) {
    std::string completion;
    for (int count = 1; count <= 400; ++count) {
      completion += character;
      const double length = count <= 64 ? 0.0 : count >= 320 ? -1.0 : -(count - 64) / 256.0;
      EXPECT_EQ(RewardOf(completion, "42").length, length) << count << " of '" << character << "'";
    }
  }
}

}  // namespace
}  // namespace example
