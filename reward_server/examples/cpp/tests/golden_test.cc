#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "service.h"

namespace example {
namespace {

// Compared so, 0.0 and -0.0 are two.
std::uint64_t Bits(double number) { return std::bit_cast<std::uint64_t>(number); }

TEST(GoldenTest, EveryVectorComesOutToTheLastBit) {
  std::ifstream file(GOLDEN);
  ASSERT_TRUE(file) << GOLDEN;
  const auto vectors = nlohmann::json::parse(file);
  ASSERT_EQ(vectors.size(), 200);
  for (const auto& vector : vectors) {
    SCOPED_TRACE(vector.at("id").get<std::string>());
    rlhf::reward::v1::Sample sample;
    sample.set_completion(vector.at("completion").get<std::string>());
    for (const auto& [key, text] : vector.at("metadata").items()) {
      (*sample.mutable_metadata())[key] = text.get<std::string>();
    }
    const auto result = Judge(sample, vector.at("json_metadata_keys").get<JsonKeys>());
    if (vector.at("outcome") == "failed") {
      EXPECT_EQ(result.failed().code(), vector.at("code"));
    } else {
      ASSERT_TRUE(result.has_scored());
      EXPECT_EQ(Bits(result.scored().reward()), Bits(vector.at("reward")));
      EXPECT_EQ(result.scored().components_size(), 3);
      for (const auto& [name, value] : vector.at("components").items()) {
        EXPECT_EQ(Bits(result.scored().components().at(name)), Bits(value)) << name;
      }
    }
  }
}

}  // namespace
}  // namespace example
