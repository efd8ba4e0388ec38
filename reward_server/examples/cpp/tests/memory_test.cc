#include "memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

namespace example {
namespace {

Remembered Entry(const std::string& name) {
  Remembered entry{name, {}};
  entry.result.set_sample_id(name);
  return entry;
}

TEST(MemoryTest, TheLeastRecentlyUsedIsForgottenFirst) {
  Memory memory(2);
  memory.Remember({"run", "a"}, Entry("a"));
  memory.Remember({"run", "b"}, Entry("b"));
  ASSERT_TRUE(memory.Recall({"run", "a"}));
  memory.Remember({"run", "c"}, Entry("c"));
  EXPECT_FALSE(memory.Recall({"run", "b"}));
  EXPECT_EQ(memory.Recall({"run", "a"})->fingerprint, "a");
  EXPECT_EQ(memory.Recall({"run", "c"})->result.sample_id(), "c");
}

TEST(MemoryTest, ItNeverHoldsMoreThanItsCapacity) {
  Memory memory(3);
  for (std::size_t number = 0; number < 100; ++number) {
    memory.Remember({"run", std::to_string(number)}, Entry("x"));
    EXPECT_EQ(memory.size(), std::min<std::size_t>(number + 1, 3));
  }
}

TEST(MemoryTest, IdsAreThoseOfOneRun) {
  Memory memory(2);
  memory.Remember({"run", "a"}, Entry("a"));
  EXPECT_FALSE(memory.Recall({"ru", "na"}));
}

TEST(MemoryTest, OfManyThreadsTheFirstOneCounts) {
  Memory memory(64);
  std::vector<std::vector<std::string>> seen(4);
  {
    std::vector<std::jthread> threads;
    for (std::size_t thread = 0; thread < seen.size(); ++thread) {
      threads.emplace_back([&memory, &answers = seen[thread], thread] {
        for (int number = 0; number < 64; ++number) {
          answers.push_back(
              memory.Remember({"run", std::to_string(number)}, Entry(std::to_string(thread))).fingerprint);
        }
      });
    }
  }
  for (const auto& answers : seen) EXPECT_EQ(answers, seen.front());
  EXPECT_EQ(memory.size(), 64);
}

}  // namespace
}  // namespace example
