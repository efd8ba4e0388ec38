"""Log-probabilities of trainer and policy server are compared, whatever the server claims to be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.support.models import make_tiny_gpt2
from tests.trainer.servers import ScriptedPolicy, completed, serving
from trainer.clients.policy import PolicyClient
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig
from trainer.run.agreement import Agreement, DisagreementError, Probe, gap_limit
from trainer.run.prompts import Prompt, Record


def probe(*rows: tuple[int, ...]) -> Probe:
    return Probe.of(Prompt(Record(0, ""), "", row) for row in rows)


async def require(server: ScriptedPolicy, ours: torch.Tensor, *, limit: float = 1e-3) -> str:
    async with serving(server.add_to) as address:
        policy = PolicyClient(address)
        try:
            agreement = Agreement(
                policy, probe((1, 2, 3), (4, 5)), temperature=1.0, limit=limit, models=[await policy.get_model()]
            )
            return await agreement.require(ours, None)
        finally:
            await policy.close()


async def test_equal_log_probabilities_agree_and_the_gap_is_told() -> None:
    said = await require(ScriptedPolicy(completed, logprob=-0.5), torch.full((3,), -0.5))

    assert said == "policy 0.0e+00 nats apart (limit 0.001)"


async def test_a_server_that_computes_something_else_is_refused_with_what_to_do() -> None:
    with pytest.raises(DisagreementError, match=r"policy, served in float32, is 0\.25 nats off .*--max-logprob-gap"):
        await require(ScriptedPolicy(completed, logprob=-0.75), torch.full((3,), -0.5))


async def test_a_gap_that_is_not_a_number_never_passes() -> None:
    with pytest.raises(DisagreementError, match="nan nats off"):
        await require(ScriptedPolicy(completed), torch.full((3,), float("nan")))


async def test_the_server_scores_all_but_the_first_token_of_each_prompt_within_its_limits() -> None:
    server = ScriptedPolicy(completed)
    server.model.max_log_probs_tokens = 3

    await require(server, torch.full((3,), -0.5))

    rows = [row for call in server.scored for row in call.sequences]
    asked = [(list(row.prompt_token_ids), list(row.completion_token_ids)) for row in rows]
    assert asked == [([1], [2, 3]), ([4], [5])]
    assert len(server.scored) == 2


def test_a_prompt_of_one_token_is_scored_too_and_a_long_one_in_part() -> None:
    short, long = probe((7,), tuple(range(200))).responses

    assert short.tolist() == [7]
    assert len(long) == 64


def test_the_trainers_log_probabilities_are_those_of_its_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path / "model"))
    config = PPOConfig(batch_size=2, mini_batch_size=2)
    learner = PPOLearner(model, config, reference=None, tokenizer_pad_id=0, temperature=0.5)

    ours = probe((1, 2, 3), (4, 5)).logprobs_by(learner)

    with torch.no_grad():
        expected = [
            torch.log_softmax(model.pretrained_model(torch.tensor([row])).logits[0, -2] / 0.5, -1)[row[-1]]
            for row in ((1, 2), (1, 2, 3), (4, 5))
        ]
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-5, rtol=0)
    assert learner.computes_in == "float32"


def test_the_limit_is_what_is_given_or_what_rounding_explains() -> None:
    assert gap_limit(0.5, ["float32"]) == 0.5
    assert gap_limit(None, ["float32", "float32"]) == 0.001
    assert gap_limit(None, ["float32", "bfloat16"]) == 0.1


def test_a_drift_is_warned_of_when_it_begins_and_not_in_every_step(caplog: pytest.LogCaptureFixture) -> None:
    agreement = Agreement(None, probe((1,)), temperature=1.0, limit=0.1, models=[])  # type: ignore[arg-type]

    with caplog.at_level(logging.WARNING):
        warned = []
        for gap in (0.05, 0.2, 0.3, None, 0.05, 0.2):
            caplog.clear()
            agreement.watch(gap)
            warned.append(["drift" in record.getMessage() for record in caplog.records])

    assert warned == [[], [True], [], [], [], [True]]
