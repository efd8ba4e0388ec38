"""One PPO step here is one PPO step of TRL 0.11.4: same inputs, same shuffles, same numbers.

Statistics agree within 1e-5·|x| + 1e-6 and parameters within 1e-6 after two steps of four epochs, with these
exceptions, each on purpose:

- the key third of `c_attn.bias` (`without_key_bias`): softmax ignores what is added to all keys, so its true gradient
  is 0 and Adam turns rounding noise into steps of ± the learning rate. It may move no farther than those;
- `objective/logprobs`, `objective/ref_logprobs`, `ppo/policy/advantages`, `ppo/policy/ratio`: TRL's cover prompt and
  padding, ours the response tokens (for the last two: the tokens trained on). The test picks these from TRL's arrays;
- `objective/kl_dist`: each number is a sum over tokens of differences of log-probabilities, which fp32 knows to 1e-6
  at best; the absolute tolerance is 1e-6 per token. The mean, `objective/kl`, keeps the tolerance of all;
- `time/…`: seconds.

With `whiten_rewards` and `max_grad_norm` TRL is recorded with its mistake mended, as make_golden.py says.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.parity.cases import NAMES, Golden, Ours, load_golden, run_ours

RELATIVE, ABSOLUTE, PARAMETERS = 1e-5, 1e-6, 1e-6

# Ours alone.
ADDED = {"ppo/policy/skipped", "ppo/grad_norm"}

each_case = pytest.mark.parametrize("name", NAMES)


@functools.cache
def case(name: str) -> tuple[Golden, Ours]:
    golden = load_golden(name)
    return golden, run_ours(golden)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the recording was made; so small a model also runs many times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(ours: Tensor | float, theirs: Tensor | float, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours, dtype=torch.float64),
        torch.as_tensor(theirs, dtype=torch.float64),
        rtol=RELATIVE,
        atol=ABSOLUTE,
        msg=lambda message: f"{what}: {message}",
    )


def without_key_bias(name: str, parameter: Tensor) -> Tensor:
    if not name.endswith("attn.c_attn.bias"):
        return parameter
    query, _, value = parameter.chunk(3)
    return torch.cat([query, value])


def test_every_condition_of_the_promise_has_a_case() -> None:
    settings = {name: load_golden(name).document for name in NAMES}
    assert {document["settings"].get("kl_penalty", "kl") for document in settings.values()} == {
        "kl",
        "abs",
        "mse",
        "full",
    }
    for wanted in ("use_score_scaling", "use_score_norm", "score_clip", "early_stopping"):
        assert {bool(document["settings"].get(wanted)) for document in settings.values()} == {True, False}, wanted
    assert any(document["settings"].get("gradient_accumulation_steps") == 2 for document in settings.values())
    assert any(document["response_masks"] for document in settings.values())
    assert settings["kl"]["settings"] == {"batch_size": 16, "mini_batch_size": 4}


@each_case
def test_the_shuffles_are_those_of_trl(name: str) -> None:
    golden, _ = case(name)
    shuffler = np.random.RandomState(golden.document["settings"].get("seed", 0))
    for step in golden.steps:
        for shuffle in golden.shuffles(step):
            assert shuffler.permutation(16).tolist() == shuffle


@each_case
def test_every_statistic_of_trl_has_its_equal_here(name: str) -> None:
    golden, ours = case(name)
    for step in golden.steps:
        theirs = {*golden.scalars(step), *golden.arrays(step)}
        assert {key for key in ours.statistics[step - 1] if not key.startswith("time/")} == theirs | ADDED


@each_case
def test_scalar_statistics_agree(name: str) -> None:
    golden, ours = case(name)
    for step in golden.steps:
        for key, theirs in golden.scalars(step).items():
            close(ours.statistics[step - 1][key], theirs, f"{name}, step {step}, {key}")


@each_case
def test_statistics_per_sample_agree(name: str) -> None:
    golden, ours = case(name)
    for step in golden.steps:
        statistics, arrays = ours.statistics[step - 1], golden.arrays(step)
        for key in ("tokens/queries_dist", "tokens/responses_dist"):
            close(statistics[key], arrays[key], f"{name}, step {step}, {key}")
        theirs = arrays["objective/kl_dist"]
        tolerance = RELATIVE * theirs.abs() + ABSOLUTE * arrays["tokens/responses_dist"]
        assert ((statistics["objective/kl_dist"] - theirs).abs() <= tolerance).all()


@each_case
def test_statistics_per_token_agree_on_response_tokens(name: str) -> None:
    golden, ours = case(name)
    for step in golden.steps:
        for key in ("objective/logprobs", "objective/ref_logprobs"):
            theirs = golden.responses_of(golden.arrays(step)[key], step)
            close(torch.cat(ours.statistics[step - 1][key]), torch.cat(theirs), f"{name}, step {step}, {key}")
        for key in ("ppo/policy/advantages", "ppo/policy/ratio"):
            theirs = golden.trained_tokens_of(golden.arrays(step)[key], step)
            close(ours.statistics[step - 1][key], torch.cat(theirs), f"{name}, step {step}, {key}")


@each_case
def test_the_share_of_skipped_mini_batches_is_what_trl_s_ratios_say(name: str) -> None:
    golden, ours = case(name)
    settings = golden.document["settings"]
    for step in golden.steps:
        ratios = golden.trained_tokens_of(golden.arrays(step)["ppo/policy/ratio"], step)
        size = settings["mini_batch_size"]
        means = [torch.cat(ratios[start : start + size]).mean() for start in range(0, len(ratios), size)]
        skipped = [mean.item() > settings.get("ratio_threshold", 10.0) for mean in means]
        assert ours.statistics[step - 1]["ppo/policy/skipped"] == pytest.approx(sum(skipped) / len(skipped))
        if name == "ratio_threshold":
            assert 0 < sum(skipped) < len(skipped)


def test_the_early_stopping_case_stops_early() -> None:
    golden, _ = case("early_stopping")
    assert min(len(golden.shuffles(step)) for step in golden.steps) < 4


@each_case
def test_the_kl_coefficient_agrees_after_each_step(name: str) -> None:
    golden, ours = case(name)
    for step in golden.steps:
        theirs = golden.document["steps"][step - 1]["kl_coef_after"]
        close(ours.kl_coefficients[step - 1], theirs, f"{name}, step {step}")


@each_case
def test_parameters_agree_after_two_steps(name: str) -> None:
    golden, ours = case(name)
    theirs = golden.parameters()
    assert ours.parameters.keys() == theirs.keys()
    for key, parameter in ours.parameters.items():
        torch.testing.assert_close(
            without_key_bias(key, parameter),
            without_key_bias(key, theirs[key]),
            rtol=0,
            atol=PARAMETERS,
            msg=lambda message, key=key: f"{name}, {key}: {message}",
        )
    moved = max((parameter - ours.initial[key]).abs().max() for key, parameter in ours.parameters.items())
    assert moved > 10 * PARAMETERS


@each_case
def test_the_key_bias_moves_no_farther_than_adam_steps(name: str) -> None:
    golden, ours = case(name)
    settings = golden.document["settings"]
    update = settings["mini_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    updates = sum(16 // update * len(golden.shuffles(step)) for step in golden.steps)
    for key, parameter in ours.parameters.items():
        if key.endswith("attn.c_attn.bias"):
            moved = (parameter - ours.initial[key]).chunk(3)[1]
            assert moved.abs().max() <= 1.41e-5 * updates


@pytest.mark.trl
@pytest.mark.skipif("TRL_PYTHON" not in os.environ, reason="TRL_PYTHON names no interpreter that has TRL 0.11.4")
def test_trl_makes_the_recorded_steps_again(tmp_path: Path) -> None:
    script = Path(__file__).parent / "make_golden.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([os.environ["TRL_PYTHON"], str(script), str(tmp_path)], check=True, env=environment)
    for name in NAMES:
        recorded, again = load_golden(name), load_golden(name, tmp_path)
        assert again.inputs == recorded.inputs
        for step in recorded.steps:
            assert again.shuffles(step) == recorded.shuffles(step)
            assert again.scalars(step) == pytest.approx(recorded.scalars(step), rel=RELATIVE, abs=ABSOLUTE)
        for key, parameter in recorded.parameters().items():
            torch.testing.assert_close(
                without_key_bias(key, again.parameters()[key]),
                without_key_bias(key, parameter),
                rtol=0,
                atol=PARAMETERS,
            )
