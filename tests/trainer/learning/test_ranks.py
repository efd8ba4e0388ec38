"""Two real processes make the steps that one makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.models import make_tiny_gpt2
from tests.support.processes import torchrun
from tests.trainer.learning.cases import CASES, step_through
from trainer.learning.ranks import Ranks

MODES = ("ddp", "fsdp")
TINY = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny_gpt2(folder / "gpt2")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2, initializer_range=0.2)).save_pretrained(
        folder / "llama"
    )
    GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, initializer_range=0.2)).save_pretrained(folder / "neox")
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks made of every case."""
    torchrun(2, "tests.trainer.learning.on_two_ranks", str(folder))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def without_key_biases(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax ignores what is added to all keys, so Adam steps there by rounding noise alone."""
    kept = dict(parameters)
    for name, tensor in parameters.items():
        if name.endswith("c_attn.bias"):
            kept[name] = torch.cat([tensor[:WIDTH], tensor[2 * WIDTH :]])
        if name.endswith("query_key_value.bias"):
            kept[name] = tensor.view(4, 3, -1)[:, [0, 2]]
    return kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_parameters_and_statistics_of_one(
    folder: Path, on_two_ranks: list[dict[str, Any]], name: str, mode: str
) -> None:
    alone, expected = step_through(CASES[name], folder)
    ours = on_two_ranks[0][f"{mode}: {name}"]

    single = without_key_biases({each: parameter.detach() for each, parameter in alone.model.named_parameters()})
    several = without_key_biases(ours["parameters"])
    assert several.keys() == single.keys()
    for each, parameter in single.items():
        torch.testing.assert_close(several[each], parameter, rtol=0, atol=1e-6, msg=lambda said, each=each: each + said)
    assert ours["state"]["kl_coefficient"] == pytest.approx(alone.kl_coefficient, rel=1e-6)
    assert ours["state"]["moments"] == alone.state_dict()["moments"]
    for step, (theirs, own) in enumerate(zip(expected, ours["statistics"], strict=True)):
        assert own.keys() == theirs.keys()
        for statistic, value in theirs.items():
            if not statistic.startswith("time/"):
                _assert_close(own[statistic], value, f"step {step}, {statistic}")


def _assert_close(own: Any, theirs: Any, what: str) -> None:
    if isinstance(theirs, float):
        assert own == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True), what
    else:
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4, msg=lambda said: what + said)


@pytest.mark.parametrize("mode", MODES)
def test_the_cases_reach_what_they_are_about(on_two_ranks: list[dict[str, Any]], mode: str) -> None:
    statistics = {name: on_two_ranks[0][f"{mode}: {name}"]["statistics"] for name in CASES}

    assert statistics["a skipped mini-batch"][0]["ppo/policy/skipped"] == 1.0
    assert statistics["plain"][0]["ppo/policy/skipped"] == 0.0
    trained_tokens = {name: len(each[1]["ppo/policy/ratio"]) for name, each in statistics.items()}
    assert trained_tokens["an early stop"] * 2 == trained_tokens["plain"]
    assert statistics["a clipped gradient"][0]["ppo/grad_norm"] > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_both_ranks_report_the_same_numbers(on_two_ranks: list[dict[str, Any]], mode: str) -> None:
    for name in CASES:
        first, second = (each[f"{mode}: {name}"]["statistics"] for each in on_two_ranks)
        for one, other in zip(first, second, strict=True):
            numbers = {key: value for key, value in one.items() if isinstance(value, float) and key[:5] != "time/"}
            assert all(other[key] == value or math.isnan(value) for key, value in numbers.items())


def test_a_sharded_model_lies_on_each_rank_in_part_and_is_gathered_on_rank_0_alone(
    on_two_ranks: list[dict[str, Any]],
) -> None:
    first, second = (each["fsdp: plain"] for each in on_two_ranks)
    whole = sum(parameter.numel() for parameter in first["parameters"].values())

    assert first["kept_here"] + second["kept_here"] == whole
    assert abs(first["kept_here"] - second["kept_here"]) < 0.01 * whole
    assert all(parameter is None for parameter in second["parameters"].values())
    moments = second["state"]["optimizer"]["state"][0]
    assert moments["exp_avg"] is None


def test_every_rank_gets_about_as_many_tokens_and_each_row_goes_to_one() -> None:
    lengths = [9, 1, 7, 3, 3, 8, 2]
    share = Ranks(1, 3).share([torch.zeros(1)] * 7, [torch.zeros(length - 1) for length in lengths])

    assert sorted(row for rows in share.dealt for row in rows) == list(range(7))
    tokens = [sum(lengths[row] for row in rows) for rows in share.dealt]
    assert max(tokens) - min(tokens) <= 2
    assert share.rows == share.dealt[1]


def test_a_rank_without_a_row_computes_the_first_one() -> None:
    share = Ranks(1, 2).share([torch.zeros(1)], [torch.zeros(3)])

    assert share.dealt == [[0], []]
    assert share.rows == [0]
