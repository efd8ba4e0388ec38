package dev.rlhf.example;

import java.util.LinkedHashMap;
import java.util.Map;

/** Values by key, up to a bound; beyond it, what was used longest ago is forgotten. For any number of threads. */
final class Memory<K, V> {
  private final Map<K, V> entries;

  Memory(int capacity) {
    // Ordered by access, not by insertion.
    entries = new LinkedHashMap<>(16, 0.75f, true) {
      @Override
      protected boolean removeEldestEntry(Map.Entry<K, V> eldest) {
        return size() > capacity;
      }
    };
  }

  synchronized V get(K key) {
    return entries.get(key);
  }

  /** Keeps the value unless another thread was first; the value that is kept. */
  synchronized V keep(K key, V value) {
    V first = entries.putIfAbsent(key, value);
    return first == null ? value : first;
  }
}
