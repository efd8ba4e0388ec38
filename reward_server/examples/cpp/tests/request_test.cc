#include "request.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace example {
namespace {

using rlhf::reward::v1::Sample;
using rlhf::reward::v1::ScoreRequest;

ScoreRequest Request(const std::vector<std::string>& sample_ids, const std::string& run_id = "run") {
  ScoreRequest request;
  request.set_run_id(run_id);
  for (const std::string& sample_id : sample_ids) {
    Sample& sample = *request.add_samples();
    sample.set_sample_id(sample_id);
    sample.set_group_id("g");
  }
  return request;
}

ScoreRequest Ranged(const std::vector<std::pair<int, int>>& bounds) {
  ScoreRequest request = Request({"a"});
  Sample& sample = *request.mutable_samples(0);
  for (int token = 0; token < 3; ++token) sample.add_completion_token_ids(token);
  for (const auto& [first, past_last] : bounds) {
    auto& range = *sample.add_sampled_ranges();
    range.set_first(first);
    range.set_past_last(past_last);
  }
  return request;
}

std::vector<std::string> WrongFields(const ScoreRequest& request) {
  std::vector<std::string> fields;
  for (const auto& violation : Violations(request)) fields.push_back(violation.field);
  return fields;
}

using Paths = std::vector<std::string>;

TEST(RequestTest, EveryWrongFieldIsNamedByItsPath) {
  EXPECT_EQ(WrongFields(Request({"a"}, "")), Paths{"run_id"});
  EXPECT_EQ(WrongFields(Request({"a"}, std::string(257, 'r'))), Paths{"run_id"});
  EXPECT_EQ(WrongFields(Request({})), Paths{"samples"});
  EXPECT_EQ(WrongFields(Request(Paths(257, "a"))), Paths{"samples"});
  EXPECT_EQ(WrongFields(Request({"a", ""})), Paths{"samples[1].sample_id"});
  EXPECT_EQ(WrongFields(Request({std::string(257, 'a')})), Paths{"samples[0].sample_id"});
  EXPECT_EQ(WrongFields(Request({"a", "b", "a"})), Paths{"samples[2].sample_id"});
  ScoreRequest without_group = Request({"a"});
  without_group.mutable_samples(0)->clear_group_id();
  EXPECT_EQ(WrongFields(without_group), Paths{"samples[0].group_id"});
  EXPECT_EQ(WrongFields(Ranged({{0, 4}})), Paths{"samples[0].sampled_ranges[0].past_last"});
  EXPECT_EQ(WrongFields(Ranged({{1, 1}})), Paths{"samples[0].sampled_ranges[0].past_last"});
  EXPECT_EQ(WrongFields(Ranged({{0, 2}, {1, 3}})), Paths{"samples[0].sampled_ranges[1].first"});
  EXPECT_EQ(WrongFields(Ranged({{2, 3}, {0, 1}})), Paths{"samples[0].sampled_ranges[1].first"});
}

TEST(RequestTest, ARequestAtTheLimitsIsRight) {
  std::vector<std::string> ids;
  for (int number = 0; number < 256; ++number) ids.push_back(std::string(253, 'a') + std::to_string(100 + number));
  EXPECT_EQ(WrongFields(Request(ids, std::string(256, 'r'))), Paths{});
  EXPECT_EQ(WrongFields(Ranged({{0, 2}, {2, 3}})), Paths{});
}

TEST(RequestTest, OfManyWrongFieldsTheFirstEightAreNamed) {
  EXPECT_EQ(WrongFields(Request(Paths(20, ""), "")).size(), kMaxViolations);
}

TEST(RequestTest, ADescriptionNamesTheValueAndTheLimit) {
  const std::string description = Violations(Request({"a"}, std::string(300, 'r'))).front().description;
  EXPECT_NE(description.find("300"), std::string::npos);
  EXPECT_NE(description.find("256"), std::string::npos);
}

}  // namespace
}  // namespace example
