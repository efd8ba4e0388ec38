from __future__ import annotations

from rlhf.reward.v1 import reward_pb2

from memory import Memory, Remembered


def entry(name: str) -> Remembered:
    return Remembered(name.encode(), reward_pb2.SampleResult(sample_id=name))


def test_the_least_recently_used_is_forgotten_first() -> None:
    memory = Memory(capacity=2)
    memory.remember("run", "a", entry("a"))
    memory.remember("run", "b", entry("b"))
    assert memory.recall("run", "a") == entry("a")
    memory.remember("run", "c", entry("c"))
    assert memory.recall("run", "b") is None
    assert memory.recall("run", "a") == entry("a")
    assert memory.recall("run", "c") == entry("c")


def test_it_never_holds_more_than_its_capacity() -> None:
    memory = Memory(capacity=3)
    for number in range(100):
        memory.remember("run", str(number), entry(str(number)))
        assert len(memory) == min(number + 1, 3)


def test_ids_are_those_of_one_run() -> None:
    memory = Memory(capacity=2)
    memory.remember("run", "a", entry("a"))
    assert memory.recall("another", "a") is None


def test_of_two_results_the_first_one_counts() -> None:
    memory = Memory(capacity=2)
    assert memory.remember("run", "a", entry("first")) == entry("first")
    assert memory.remember("run", "a", entry("second")) == entry("first")
    assert memory.recall("run", "a") == entry("first")
