"""docs/reward-server.md says what the code does."""

from __future__ import annotations

import re

from prometheus_client import REGISTRY

import reward_server.metrics  # noqa: F401 - declares the metrics
from reward_server.builtins import BUILTINS
from reward_server.results import FailureCode
from reward_server.settings import RewardSettings
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "reward-server.md").read_text()


def test_every_flag_it_names_exists() -> None:
    flags = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    assert flags - {"config", "help"} <= set(RewardSettings.model_fields)


def test_every_metric_is_on_the_page() -> None:
    declared = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("rlhf_reward_")}
    named = {name.removesuffix("_total") for name in re.findall(r"`?(rlhf_reward_[a-z_]+)", PAGE)}
    assert declared == named


def test_every_built_in_and_every_code_of_its_own_is_on_the_page() -> None:
    assert all(f"| `{name}` |" in PAGE for name in BUILTINS)
    own = {FailureCode.FUNCTION_RAISED, FailureCode.WRONG_RESULT, FailureCode.NOT_FINITE}
    assert all(f"`{code.value}`" in PAGE for code in own)


def test_its_first_function_can_be_served() -> None:
    source = re.search(r"# my_reward.py\n(.*?)```", PAGE, re.S)
    assert source is not None
    namespace: dict[str, object] = {}
    exec(source.group(1), namespace)
    short = namespace["short"]
    assert callable(short)
    assert short(prompts=["a"], completions=["b" * 50]) == [-0.5]
