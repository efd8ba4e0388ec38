"""Every benchmark at a size at which it says nothing: that it runs, and that what it writes is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main

MARKS = {
    "rollout": pytest.mark.slow,
    "swap": pytest.mark.slow,
    "logprobs": pytest.mark.slow,
    "step": (pytest.mark.slow, pytest.mark.trl),
    "iteration": pytest.mark.slow,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in BENCHMARKS])
def test_a_benchmark_prints_its_table_and_writes_all_of_its_figures(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([name, "--quick", "--threads", "1", "--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")])
    assert "GFLOP/s" in capsys.readouterr().out
    assert (tmp_path / "run.svg").read_text().count("<path") > 5
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["machine"]["threads"] == 1
    assert document["machine"]["cpu"]
    found = document["benchmarks"][name]
    assert all(limit > 0 for limit in found["limits"].values())
    assert all(share > 0 for share in found["reached"].values())
    CHECKS[name](found)


def check_rates(found: dict[str, Any]) -> None:
    assert set(found["rates"]) == set(found["medians"]) == set(found["ratios"])
    assert all(rate > 0 for rates in found["rates"].values() for rate in rates)


def check_rollout(found: dict[str, Any]) -> None:
    check_rates(found)
    assert set(found["rates"]) == {
        "transformers, continuous batching",
        "transformers generate, static batch",
        "policy server over gRPC",
        "bare loop, in process",
    }


def check_latency(found: dict[str, Any]) -> None:
    assert found["capacity"] > 0
    assert {(phase["condition"], phase["load"]) for phase in found["phases"]} == {
        (condition, load)
        for condition in ("alone", "beside rollouts", "beside rollouts, sent as bulk")
        for load in found["settings"]["loads"]
    }
    for phase in found["phases"]:
        answered = [answer for answer in phase["answers"] if answer["first"] is not None]
        assert len(answered) + phase["rejected"] == len(phase["answers"])
        assert all(len(answer["gaps"]) >= found["settings"]["shortest"] - 1 for answer in answered)
        assert (phase["rollout_rate"] > 0) == (phase["condition"] != "alone")


def check_swap(found: dict[str, Any]) -> None:
    for size in found["sizes"]:
        check_rates(size)
        assert all(milliseconds > 0 for values in size["pauses_ms"].values() for milliseconds in values)


def check_logprobs(found: dict[str, Any]) -> None:
    check_rates(found)
    differences = found["differences"]
    rpcs, dtypes = ("LogProbs of the policy", "Generate's own"), ("float32", "bfloat16")
    assert set(differences) == {f"{rpc}, {dtype}" for rpc in rpcs for dtype in dtypes}
    for name, each in differences.items():
        assert 0 <= each["mean"] <= each["p99"] <= each["largest"] < (1e-4 if "float32" in name else 1.0)


def check_score(found: dict[str, Any]) -> None:
    assert len(found["servers"]) == 3
    assert all(server["p99"] >= server["p50"] > 0 for server in found["servers"].values())


def check_step(found: dict[str, Any]) -> None:
    assert {"TRL 0.11.4", "ours"} <= set(found["rounds"]) == set(found["ratios"])
    assert found["largest_difference"] < 1e-5


def check_iteration(found: dict[str, Any]) -> None:
    assert {"one process", "three processes", "slow reward"} <= set(found["steps"])
    assert set(found["steps"]) == set(found["medians"]) == set(found["ratios"])
    assert found["reward_seconds"] > 0
    for steps in found["steps"].values():
        assert len(steps) == found["settings"]["steps"] - 2
        assert all(step["step"] > 0 and set(step["phases"]) == {"rollout", "learn", "publish"} for step in steps)


CHECKS = {
    "rollout": check_rollout,
    "latency": check_latency,
    "swap": check_swap,
    "logprobs": check_logprobs,
    "score": check_score,
    "step": check_step,
    "iteration": check_iteration,
    "hostile": check_rates,
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("rollout", "--plot", "run.jpg"), "must end with one of"),
        (("rollout", "--json", "no/such/run.json"), "there is no folder"),
        (("rollout", "--model", "no/such"), "--model no/such: there is no config.json"),
        (("rollout", "--threads", "0"), "--threads 0: at least 1"),
    ],
)
def test_a_wrong_option_ends_it_before_anything_is_measured(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
