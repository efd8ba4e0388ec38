package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;

import java.util.Collections;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;

class MemoryTest {
  @Test
  void beyondTheBoundTheLeastRecentlyUsedIsForgotten() {
    Memory<String, Integer> memory = new Memory<>(2);
    memory.keep("a", 1);
    memory.keep("b", 2);
    assertEquals(1, memory.get("a"));
    memory.keep("c", 3);
    assertEquals(1, memory.get("a"));
    assertNull(memory.get("b"));
    assertEquals(3, memory.get("c"));
  }

  @Test
  void theFirstValueUnderAKeyIsKept() {
    Memory<String, Integer> memory = new Memory<>(2);
    assertEquals(1, memory.keep("a", 1));
    assertEquals(1, memory.keep("a", 2));
    assertEquals(1, memory.get("a"));
  }

  @Test
  void threadsThatKeepValuesUnderTheSameKeysAgreeOnThem() throws Exception {
    int threads = 4;
    int keys = 100_000;
    Memory<Integer, Object> memory = new Memory<>(keys);
    CyclicBarrier start = new CyclicBarrier(threads);
    Callable<List<Object>> keepAll =
        () -> {
          start.await();
          return IntStream.range(0, keys).mapToObj(key -> memory.keep(key, new Object())).toList();
        };
    ExecutorService pool = Executors.newFixedThreadPool(threads);
    try {
      Set<List<Object>> kept = new HashSet<>();
      for (Future<List<Object>> each : pool.invokeAll(Collections.nCopies(threads, keepAll))) {
        kept.add(each.get());
      }
      assertEquals(1, kept.size());
    } finally {
      pool.shutdownNow();
    }
  }
}
