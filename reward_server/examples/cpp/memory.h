// What became of the samples of the recent past, so that a repeated one gets the same answer.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "rlhf/reward/v1/reward.pb.h"

namespace example {

// Ids are unique within a run only.
struct SampleKey {
  std::string run_id;
  std::string sample_id;

  auto operator<=>(const SampleKey&) const = default;
};

// A sample's result, with the fingerprint of the content that it is for.
struct Remembered {
  std::string fingerprint;
  rlhf::reward::v1::SampleResult result;
};

// At most `capacity` results, the least recently used forgotten first. Safe to use from many threads.
class Memory {
 public:
  explicit Memory(std::size_t capacity) : capacity_(capacity) {}

  std::optional<Remembered> Recall(const SampleKey& key);

  // Keeps a result, and returns the one that counts: that of another call which was faster, where there is one.
  Remembered Remember(const SampleKey& key, Remembered entry);

  std::size_t size() const;

 private:
  // The most recently used first; the index points into it.
  using Entries = std::list<std::pair<SampleKey, Remembered>>;

  const Remembered& Refresh(Entries::iterator entry);

  const std::size_t capacity_;
  mutable std::mutex mutex_;
  Entries entries_;
  std::map<SampleKey, Entries::iterator> index_;
};

}  // namespace example
