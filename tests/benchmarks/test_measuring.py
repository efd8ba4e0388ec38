from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.benchmarks import latency, rollout
from tests.benchmarks.latency import Answer, Latencies, Phase
from tests.benchmarks.measuring import Measurement, log_uniform, percentile
from tests.benchmarks.output import plot_problem, write_json
from tests.benchmarks.roofline import Limits

LIMITS = Limits(mm_flops=1e9, onednn_flops=2e9, read_bytes=1e9, copied_bytes=1e9)


def test_a_ratio_is_taken_round_by_round() -> None:
    measurement = Measurement("", "", {"slow": [1.0, 10.0, 100.0], "fast": [3.0, 20.0, 200.0]})
    assert measurement.ratio("fast") == 2.0
    assert measurement.ratio("slow", to="fast") == 0.5


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.99, 5.0), (1.0, 5.0)])
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([5.0, 1.0, 3.0, 2.0, 4.0], share) == expected


def test_lengths_stay_between_their_ends_and_repeat() -> None:
    lengths = log_uniform(200, 8, 128)
    assert lengths == log_uniform(200, 8, 128)
    assert 8 <= min(lengths) < 12
    assert 100 < max(lengths) <= 128


def test_no_work_is_faster_than_its_arithmetic_or_its_traffic() -> None:
    assert LIMITS.seconds(flops=4e9, read=1e9) == 2.0
    assert LIMITS.seconds(flops=1e9, read=3e9) == 3.0


def test_the_roofline_of_a_rollout_counts_every_step() -> None:
    config = GPT2Config(n_embd=10, n_layer=1, vocab_size=100)  # 1,200 weights in the layers, 1,000 in the head
    work = rollout.Work(prompts=1, prompt_tokens=2, shortest=2, longest=2)
    prompt = max(2 * (2 * 1200 + 1000) / 2e9, 4 * 2200 / 1e9)
    step = max((2 * 2200 + 2 * 60) / 2e9, 4 * (2200 + 60) / 1e9)  # keys and values of 3 positions
    assert rollout.least_seconds(config, work, LIMITS) == pytest.approx(prompt + step)


def test_a_rejected_or_a_slow_request_is_not_a_good_one() -> None:
    work = latency.Work(first=1.0, gap=0.2, seconds=2.0)
    good, late, halting, rejected = (
        Answer(0.9, [0.1] * 9),
        Answer(1.1, [0.1] * 9),
        Answer(0.9, [0.1] * 9 + [0.3]),
        Answer(None, []),
    )
    phase = Phase(latency.ALONE, load=1.0, rate=2.0, answers=[good, late, halting, rejected], rollout_rate=0.0)
    assert [answer.meets(work) for answer in phase.answers] == [True, False, False, False]
    assert Latencies(work, 2.0, [phase]).goodput(phase) == 0.5
    assert phase.rejected == 1
    assert phase.firsts(1.0) == 1.1


def test_what_is_not_a_number_becomes_null_in_the_document(tmp_path: Path) -> None:
    write_json({"p99": percentile([], 0.99), "of": [math.inf, 1.5]}, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == {"p99": None, "of": [None, 1.5]}


def test_a_picture_in_an_unknown_format_is_refused_by_name() -> None:
    assert plot_problem(Path("run.png")) is None
    assert ".jpg" in str(plot_problem(Path("run.jpg")))
