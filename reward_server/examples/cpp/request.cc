#include "request.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace example {
namespace {

using rlhf::reward::v1::Sample;

constexpr std::size_t kMaxIdBytes = 256;

class Report {
 public:
  void Add(std::string field, std::string description) {
    if (violations_.size() < kMaxViolations) violations_.emplace_back(std::move(field), std::move(description));
  }

  void CheckId(const std::string& path, const std::string& id) {
    if (id.empty()) {
      Add(path, "required");
    } else if (id.size() > kMaxIdBytes) {
      Add(path, fmt::format("{} bytes; the limit is {}", id.size(), kMaxIdBytes));
    }
  }

  void CheckRanges(const std::string& path, const Sample& sample) {
    const auto tokens = static_cast<std::uint32_t>(sample.completion_token_ids_size());
    std::uint32_t end = 0;
    for (int index = 0; index < sample.sampled_ranges_size(); ++index) {
      const auto& range = sample.sampled_ranges(index);
      const std::string at = fmt::format("{}[{}]", path, index);
      if (range.first() < end) {
        Add(at + ".first", fmt::format("{} is below {}, where the range before it ends", range.first(), end));
      }
      if (range.past_last() <= range.first()) {
        Add(at + ".past_last", fmt::format("{} is not above first, {}", range.past_last(), range.first()));
      } else if (range.past_last() > tokens) {
        Add(at + ".past_last", fmt::format("{} is beyond the {} token ids", range.past_last(), tokens));
      }
      end = std::max(end, range.past_last());
    }
  }

  std::vector<Violation> Take() { return std::move(violations_); }

 private:
  std::vector<Violation> violations_;
};

}  // namespace

std::vector<Violation> Violations(const rlhf::reward::v1::ScoreRequest& request) {
  Report report;
  report.CheckId("run_id", request.run_id());
  const int count = request.samples_size();
  if (count < 1 || count > kMaxSamples) {
    report.Add("samples", fmt::format("{} samples; from 1 to {} are allowed", count, kMaxSamples));
    return report.Take();
  }
  std::unordered_map<std::string_view, int> first_use;
  for (int index = 0; index < count; ++index) {
    const Sample& sample = request.samples(index);
    const std::string path = fmt::format("samples[{}]", index);
    report.CheckId(path + ".sample_id", sample.sample_id());
    const auto [first, is_new] = first_use.try_emplace(sample.sample_id(), index);
    if (!is_new && !sample.sample_id().empty()) {
      report.Add(path + ".sample_id", fmt::format("the same as samples[{}].sample_id", first->second));
    }
    if (sample.group_id().empty()) report.Add(path + ".group_id", "required");
    report.CheckRanges(path + ".sampled_ranges", sample);
  }
  return report.Take();
}

}  // namespace example
