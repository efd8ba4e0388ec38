"""The setting `engine`: one contract, whichever runs the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from policy_server.assembly import ModelError
from policy_server.engine.batch import BatchEngine
from policy_server.engine.transformers_engine import TransformersEngine
from policy_server.settings import PolicySettings
from rlhf.policy.v1 import policy_pb2
from tests.policy_server.engine.architectures import make_model
from tests.policy_server.harness import generate, greedy, publish, serving, update, version, weights_of
from tests.support.models import make_byte_tokenizer

BOTH = [policy_pb2.LOG_PROB_KIND_RAW, policy_pb2.LOG_PROB_KIND_PROCESSED]


async def test_both_engines_give_the_same_tokens_and_take_new_weights(tiny_model: Path, other_model: Path) -> None:
    answers = []
    for name, kind in (("own", BatchEngine), ("transformers", TransformersEngine)):
        async with serving(tiny_model, engine=name) as served:
            assert type(served.engine) is kind
            assert list((await served.policy.GetModel(policy_pb2.GetModelRequest())).logprobs) == BOTH
            before = await greedy(served)
            sampled = await served.policy.Generate(generate(n=3, seed=7, top_p=0.9, logprobs=BOTH), timeout=30)
            await publish(served, update(weights_of(other_model), version(1)))
            tokens = [list(completion.token_ids) for completion in sampled.completions]
            answers.append((before, tokens, await greedy(served)))
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][2]


async def test_a_model_that_the_engine_cannot_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    make_model("bloom").save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"Bloom\w+ can't run in transformers' continuous batching"):
        async with serving(tmp_path, engine="transformers"):
            pass


def test_an_engine_that_mixes_requests_is_refused_for_what_must_repeat() -> None:
    with pytest.raises(ValidationError, match="reproducible"):
        PolicySettings(model="any", engine="transformers", reproducible=True)
