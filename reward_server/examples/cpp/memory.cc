#include "memory.h"

namespace example {

std::optional<Remembered> Memory::Recall(const SampleKey& key) {
  const std::scoped_lock lock(mutex_);
  const auto found = index_.find(key);
  if (found == index_.end()) return std::nullopt;
  return Refresh(found->second);
}

Remembered Memory::Remember(const SampleKey& key, Remembered entry) {
  const std::scoped_lock lock(mutex_);
  if (const auto found = index_.find(key); found != index_.end()) return Refresh(found->second);
  entries_.emplace_front(key, std::move(entry));
  index_.emplace(key, entries_.begin());
  Remembered kept = entries_.front().second;
  if (entries_.size() > capacity_) {
    index_.erase(entries_.back().first);
    entries_.pop_back();
  }
  return kept;
}

std::size_t Memory::size() const {
  const std::scoped_lock lock(mutex_);
  return entries_.size();
}

const Remembered& Memory::Refresh(Entries::iterator entry) {
  entries_.splice(entries_.begin(), entries_, entry);
  return entry->second;
}

}  // namespace example
