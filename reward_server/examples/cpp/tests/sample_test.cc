#include "sample.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>
#include <string>

namespace example {
namespace {

using rlhf::reward::v1::FINISH_REASON_EOS;
using rlhf::reward::v1::Sample;

const JsonKeys kAnswer{"answer"};

Sample WithMetadata(const std::map<std::string, std::string>& metadata) {
  Sample sample;
  sample.set_sample_id("a");
  sample.set_group_id("g");
  sample.mutable_metadata()->insert(metadata.begin(), metadata.end());
  return sample;
}

std::string CodeOf(const std::function<void()>& judge) {
  try {
    judge();
  } catch (const Unjudgeable& reason) {
    EXPECT_LE(std::string(reason.what()).size(), 1024);
    return reason.code();
  }
  return "";
}

TEST(SampleTest, AJsonStringStandsForItsContentAndOtherJsonForItsText) {
  EXPECT_EQ(ReferenceAnswer(WithMetadata({{"answer", R"("\u0034\u0032\n")"}}), "answer", kAnswer), "42\n");
  EXPECT_EQ(ReferenceAnswer(WithMetadata({{"answer", " 42\n"}}), "answer", kAnswer), " 42\n");
  EXPECT_EQ(ReferenceAnswer(WithMetadata({{"answer", "[1]"}}), "answer", kAnswer), "[1]");
}

TEST(SampleTest, AColumnThatIsNotListedIsPlainText) {
  EXPECT_EQ(ReferenceAnswer(WithMetadata({{"answer", "null"}}), "answer", {"other"}), "null");
}

TEST(SampleTest, NoValueAndJsonNullAreMissing) {
  for (const Sample& sample : {WithMetadata({}), WithMetadata({{"answer", "null"}})}) {
    EXPECT_EQ(CodeOf([&] { ReferenceAnswer(sample, "answer", kAnswer); }), "MISSING_METADATA");
  }
}

TEST(SampleTest, WhatIsNotJsonWhereTheCallSaysSoFails) {
  for (const std::string& text :
       {std::string(), std::string("NaN"), std::string("[1,]"), std::string("'a'"), std::string("{a:1}"),
        std::string("42\0", 3), std::string("\xEF\xBB\xBF[]"), std::string(100'000, '[')}) {
    for (const std::string& column : {std::string("answer"), std::string(5000, 'k')}) {
      const Sample sample = WithMetadata({{column, text}});
      EXPECT_EQ(CodeOf([&] { Check(sample, {column}); }), "INVALID_METADATA") << text.substr(0, 10);
      EXPECT_EQ(CodeOf([&] { Check(sample, {}); }), "");
    }
  }
}

TEST(SampleTest, ExtraJsonHasToBeAnObject) {
  for (const std::string extra : {"[1]", "{", R"("name")"}) {
    Sample sample;
    sample.add_messages()->set_extra_json(extra);
    EXPECT_EQ(CodeOf([&] { Check(sample, {}); }), "INVALID_METADATA") << extra;
  }
}

TEST(SampleTest, APartOfAnUnknownKindIsNotSkipped) {
  Sample sample;
  sample.add_messages()->set_extra_json("{}");
  sample.mutable_messages(0)->add_parts()->set_text("see:");
  EXPECT_EQ(CodeOf([&] { Check(sample, {}); }), "");
  sample.mutable_messages(0)->add_parts();
  EXPECT_EQ(CodeOf([&] { Check(sample, {}); }), "UNKNOWN_CONTENT");
}

TEST(SampleTest, TheFingerprintIsOfAllButTheGroup) {
  const Sample sample = WithMetadata({{"answer", "1"}, {"row", "2"}});
  const std::string first = Fingerprint(sample, kAnswer);
  Sample other_group = sample;
  other_group.set_group_id("h");
  other_group.set_group_size(8);
  EXPECT_EQ(Fingerprint(other_group, kAnswer), first);
  EXPECT_EQ(Fingerprint(sample, {"absent", "answer"}), first);
  Sample other_prompt = sample;
  other_prompt.set_prompt("?");
  Sample other_end = sample;
  other_end.set_finish_reason(FINISH_REASON_EOS);
  const std::set<std::string> all = {first,
                                     Fingerprint(sample, {}),
                                     Fingerprint(sample, {"answer", "row"}),
                                     Fingerprint(WithMetadata({{"answer", "1"}, {"row", "3"}}), kAnswer),
                                     Fingerprint(other_prompt, kAnswer),
                                     Fingerprint(other_end, kAnswer)};
  EXPECT_EQ(all.size(), 6);
}

TEST(SampleTest, AHeadIsCutBetweenCodePoints) {
  EXPECT_EQ(Head("short"), "short");
  EXPECT_EQ(Head("\u00e9\u00e9\u00e9", 5), "\u00e9\u00e9");
}

}  // namespace
}  // namespace example
