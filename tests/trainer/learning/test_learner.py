from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from tests.support.models import make_tiny_gpt2
from tests.trainer.learning.support import load, make_batch, make_learner, parameters, same
from trainer.learning.assessment import assess
from trainer.learning.learner import NonFiniteLossError, PPOLearner
from trainer.ppo.config import PPOConfig
from trainer.responses.activations import fuse_activations
from trainer.responses.packing import enable_packing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("model"))


def logprobs_of(folder: Path, batch: Any, *, temperature: float = 1.0) -> list[torch.Tensor]:
    model = load(folder)
    fuse_activations(model)
    assessment = assess(
        model,
        None,
        batch.queries,
        batch.responses,
        temperature=temperature,
        with_full_kl=False,
        packed=enable_packing(model.pretrained_model),
        mini_batch_size=4,
        pad_id=0,
        device=torch.device("cpu"),
    )
    return [row[: len(ids)] for row, ids in zip(assessment.logprobs, batch.responses, strict=True)]


def test_what_earned_more_becomes_likelier(folder: Path) -> None:
    learner = make_learner(folder, settings={"learning_rate": 1e-3, "init_kl_coef": 0.0})
    batch = make_batch(scores=torch.tensor([1.0, -1.0] * 4))
    before = torch.stack([row.sum() for row in logprobs_of(folder, batch)])
    for _ in range(5):
        learner.step(batch)
    after = torch.stack([row.sum() for row in learner.step(batch)["objective/logprobs"]])
    good = batch.scores > 0
    assert (after - before)[good].mean() > (after - before)[~good].mean() + 1.0


def test_no_forward_has_dropout_so_the_first_ratios_are_1(folder: Path) -> None:
    learner = make_learner(folder, settings={"ppo_epochs": 1, "mini_batch_size": 8})
    assert learner.model.pretrained_model.config.resid_pdrop > 0
    learner.model.train()
    ratio = learner.step(make_batch())["ppo/policy/ratio"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_a_step_with_the_same_input_makes_the_same_parameters(folder: Path) -> None:
    first, second = (make_learner(folder) for _ in range(2))
    for learner in (first, second):
        learner.step(make_batch())
    assert same(parameters(first), parameters(second))


def test_the_pad_token_does_not_matter(folder: Path) -> None:
    first, second = (
        PPOLearner(
            load(folder),
            PPOConfig(batch_size=8),
            reference=load(folder),
            tokenizer_pad_id=pad,
        )
        for pad in (256, 65)
    )
    for learner in (first, second):
        learner.step(make_batch())
    assert same(parameters(first), parameters(second))


def test_reference_log_probabilities_may_come_with_the_batch(folder: Path) -> None:
    own, given = make_learner(folder), make_learner(folder, reference=False)
    batch = make_batch()
    own.step(batch)
    given.step(make_batch(reference_logprobs=logprobs_of(folder, batch)))
    assert same(parameters(own), parameters(given))


def test_the_reference_may_be_a_plain_language_model(folder: Path) -> None:
    plain = PPOLearner(
        load(folder),
        PPOConfig(batch_size=8),
        reference=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer_pad_id=0,
    )
    assert plain.step(make_batch())["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_all_log_probabilities_are_at_the_training_temperature(folder: Path) -> None:
    batch = make_batch()
    statistics = make_learner(folder, temperature=0.5).step(batch)
    torch.testing.assert_close(statistics["objective/logprobs"], logprobs_of(folder, batch, temperature=0.5))
    torch.testing.assert_close(statistics["objective/ref_logprobs"], statistics["objective/logprobs"])


def test_old_log_probabilities_may_be_those_of_the_rollout(folder: Path) -> None:
    rollout = [row - 0.1 for row in logprobs_of(folder, make_batch())]
    batch = make_batch(rollout_logprobs=rollout)
    learner = make_learner(
        folder, old_logprobs="rollout", settings={"ppo_epochs": 1, "mini_batch_size": 8, "init_kl_coef": 0.0}
    )
    statistics = learner.step(batch)
    torch.testing.assert_close(statistics["objective/logprobs"], rollout)
    assert statistics["ppo/policy/ratio"].mean().item() == pytest.approx(math.exp(0.1), rel=1e-4)


@pytest.mark.parametrize("old_logprobs", ["trainer", "rollout"])
def test_the_gap_between_trainer_and_rollout_is_reported(folder: Path, old_logprobs: Any) -> None:
    rollout = [row.clone() for row in logprobs_of(folder, make_batch())]
    rollout[2][0] += 0.5
    tokens = sum(len(row) for row in rollout)
    statistics = make_learner(folder, old_logprobs=old_logprobs).step(make_batch(rollout_logprobs=rollout))
    assert statistics["rollout/logprob_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert statistics["rollout/logprob_gap_mean"] == pytest.approx(0.5 / tokens, abs=1e-4)


def test_stale_tokens_weigh_by_how_much_likelier_they_became(folder: Path) -> None:
    def trained(rollout_logprobs: list[torch.Tensor] | None, **options: Any) -> tuple[Any, dict[str, Any]]:
        learner = make_learner(folder, settings={"ppo_epochs": 1, "vf_coef": 0.0}, **options)
        statistics = learner.step(make_batch(rollout_logprobs=rollout_logprobs, staleness=torch.arange(8) % 3))
        return parameters(learner), statistics

    unweighted, statistics = trained(None)
    old = statistics["objective/logprobs"]
    fresh, as_fresh = trained(old, importance_cap=2.0)
    stale, as_stale = trained([row + 1 for row in old], importance_cap=2.0)
    _, as_capped = trained([row - 9 for row in old], importance_cap=2.0)

    assert same(fresh, unweighted)
    assert not same(stale, unweighted)
    weights = [as_fresh, as_stale, as_capped]
    assert [each["ppo/policy/importance_weight_mean"] for each in weights] == pytest.approx([1, math.exp(-1), 2])
    assert [each["ppo/policy/importance_clipped"] for each in weights] == [0, 0, 1]
    assert as_capped["ppo/loss/policy"] == pytest.approx(2 * as_fresh["ppo/loss/policy"], abs=1e-6)
    assert as_stale["rollout/staleness_mean"] == 7 / 8
    assert as_stale["rollout/staleness_max"] == 2


def test_token_rewards_count_like_a_score_on_the_last_token(folder: Path) -> None:
    batch = make_batch()
    as_score, as_token_rewards = make_learner(folder), make_learner(folder)
    rewards = [torch.zeros(len(ids)) for ids in batch.responses]
    for row, score in zip(rewards, batch.scores, strict=True):
        row[-1] = score
    as_score.step(batch)
    as_token_rewards.step(make_batch(scores=torch.zeros(8), token_rewards=rewards))
    assert same(parameters(as_score), parameters(as_token_rewards))


def test_a_batch_that_shrank_trains_and_counts_what_it_has(folder: Path) -> None:
    learner = make_learner(folder, settings={"gradient_accumulation_steps": 2, "target": 1.0, "horizon": 100.0})
    before = parameters(learner)
    statistics = learner.step(make_batch(5))
    assert len(statistics["objective/kl_dist"]) == 5
    assert learner.kl_coefficient == pytest.approx(0.2 * (1 - 0.2 * 5 / 100))
    assert not same(before, parameters(learner))


def test_one_response_of_one_token_trains_to_finite_parameters(folder: Path) -> None:
    learner = make_learner(folder, settings={"batch_size": 1, "mini_batch_size": 1, "use_score_scaling": True})
    before = parameters(learner)
    statistics = learner.step(
        make_batch(1, queries=[torch.tensor([5])], responses=[torch.tensor([9])], scores=torch.tensor([1.0]))
    )
    assert all(parameter.isfinite().all() for parameter in parameters(learner).values())
    assert not same(before, parameters(learner))
    assert statistics["ppo/mean_scores"] == pytest.approx(1.0)
    assert math.isnan(statistics["ppo/std_scores"])
    assert math.isnan(statistics["ppo/returns/var"])


def test_a_ratio_that_overflows_skips_the_mini_batch_instead_of_failing(folder: Path) -> None:
    rollout = [row - 200 for row in logprobs_of(folder, make_batch())]
    learner = make_learner(folder, old_logprobs="rollout")
    before = parameters(learner)
    statistics = learner.step(make_batch(rollout_logprobs=rollout))
    assert statistics["ppo/policy/skipped"] == 1.0
    assert statistics["ppo/loss/total"] == 0.0
    assert same(before, parameters(learner))


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(folder: Path) -> None:
    learner = make_learner(folder)
    with torch.no_grad():
        learner.model.v_head.summary.bias.fill_(1e30)
    before = parameters(learner)
    with pytest.raises(NonFiniteLossError, match="the loss of a mini-batch is") as caught:
        learner.step(make_batch())
    assert not math.isfinite(caught.value.statistics["ppo/loss/value"])
    assert same(before, parameters(learner))


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(folder: Path) -> None:
    learner = make_learner(folder)
    learner.model.v_head.summary.weight.register_hook(lambda gradient: gradient * math.nan)
    before = parameters(learner)
    with pytest.raises(NonFiniteLossError, match="the norm of the gradient is nan"):
        learner.step(make_batch())
    assert same(before, parameters(learner))


def test_every_update_is_clipped_not_only_the_first(folder: Path) -> None:
    model, limit, updates = load(folder), 0.01, 8
    learner = PPOLearner(
        model,
        PPOConfig(batch_size=8, mini_batch_size=4, max_grad_norm=limit),
        reference=load(folder),
        tokenizer_pad_id=0,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )
    before = parameters(learner)
    statistics = learner.step(make_batch())
    after = parameters(learner)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    assert statistics["ppo/grad_norm"] > 10 * limit
    assert limit < moved <= updates * limit * 1.001


def test_the_scheduler_moves_once_per_step_after_the_rate_is_reported(folder: Path) -> None:
    model = load(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    learner = PPOLearner(
        model,
        PPOConfig(batch_size=8, mini_batch_size=4),
        reference=load(folder),
        tokenizer_pad_id=0,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5),
    )
    rates = [learner.step(make_batch())["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([1e-4, 5e-5, 2.5e-5])


def test_a_schedule_can_be_made_of_the_learner_s_own_optimizer(folder: Path) -> None:
    learner = make_learner(folder, lr_scheduler=lambda made: torch.optim.lr_scheduler.ExponentialLR(made, gamma=0.5))
    rates = [learner.step(make_batch())["ppo/learning_rate"] for _ in range(2)]
    assert rates == pytest.approx([1e-4, 5e-5])


def test_recomputed_activations_make_the_same_parameters(folder: Path) -> None:
    kept, recomputed = make_learner(folder), make_learner(folder, settings={"gradient_checkpointing": True})
    for learner in (kept, recomputed):
        learner.step(make_batch())
    for name, parameter in parameters(kept).items():
        torch.testing.assert_close(parameters(recomputed)[name], parameter)


def test_an_accelerator_on_the_cpu_changes_nothing(folder: Path) -> None:
    plain, accelerated = make_learner(folder), make_learner(folder, accelerator=Accelerator(cpu=True))
    for learner in (plain, accelerated):
        learner.step(make_batch())
    assert same(parameters(plain), parameters(accelerated))


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """accelerate keeps one precision for the whole process."""
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_bf16_autocast_moves_fp32_weights_about_where_fp32_moves_them(folder: Path, bf16: Accelerator) -> None:
    full, half = make_learner(folder), make_learner(folder, accelerator=bf16)
    before = parameters(full)
    statistics = [learner.step(make_batch()) for learner in (full, half)]
    assert all(parameter.dtype == torch.float32 for parameter in parameters(half).values())
    moved, moved_half = (
        torch.cat([(after - before[name]).flatten() for name, after in parameters(learner).items()])
        for learner in (full, half)
    )
    assert not torch.equal(moved, moved_half)
    assert torch.cosine_similarity(moved, moved_half, dim=0) > 0.8
    assert statistics[1]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    difference = torch.cat(statistics[0]["objective/logprobs"]) - torch.cat(statistics[1]["objective/logprobs"])
    assert 0 < difference.abs().max() < 0.5


def test_the_policy_s_parameters_have_the_names_of_transformers(folder: Path) -> None:
    learner = make_learner(folder)
    published = dict(learner.policy_parameters())
    stored = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert stored.keys() - published.keys() == {"lm_head.weight"}
    assert all(torch.equal(published[name], stored[name]) for name in published)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"temperature": 0.0}, "temperature is 0.0"),
        ({}, {"importance_cap": 0.0}, "importance_cap is 0.0"),
        ({"kl_penalty": "full"}, {"reference": False}, "kl_penalty=full needs .* its own reference"),
        ({"kl_penalty": "full"}, {"old_logprobs": "rollout"}, "kl_penalty=full needs .* old_logprobs=trainer"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(
    folder: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_learner(folder, settings=settings, **options)


def test_a_model_is_not_its_own_reference(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="the trained model itself"):
        PPOLearner(model, PPOConfig(batch_size=8), reference=model, tokenizer_pad_id=0)


def test_an_accelerator_that_accumulates_by_itself_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        make_learner(folder, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (9, {}, "the batch has 9 samples, batch_size is 8"),
        (8, {"reference": False}, "no reference_logprobs"),
        (8, {"old_logprobs": "rollout"}, "needs rollout_logprobs"),
        (8, {"importance_cap": 2.0}, "importance_cap needs rollout_logprobs"),
    ],
)
def test_a_batch_that_does_not_fit_the_settings_changes_nothing(
    folder: Path, rows: int, options: dict[str, Any], message: str
) -> None:
    learner = make_learner(folder, **options)
    before = parameters(learner)
    with pytest.raises(ValueError, match=message):
        learner.step(make_batch(rows))
    assert same(before, parameters(learner))
    assert learner.completed_steps == 0
