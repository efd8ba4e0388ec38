from __future__ import annotations

from pathlib import Path

import pytest
import torch

from policy_server.engine.loading import load_models
from policy_server.engine.protocol import InFlight, ParameterSpec
from policy_server.engine.weights import ALIGNMENT, ParameterTable
from rlhf.fingerprints import weights_digest
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import FIRST, SECOND, generate, request, running
from tests.support.models import make_tiny_gpt2

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_aligned_frozen_and_of_the_serving_type(tmp_path: Path, dtype: torch.dtype) -> None:
    models = load_models(make_tiny_gpt2(tmp_path), None, dtype, "cpu", False)
    for model in (models.policy, models.reference):
        assert not model.training
        for parameter in model.parameters():
            assert parameter.data_ptr() % ALIGNMENT == 0
            assert (parameter.dtype, parameter.requires_grad) == (dtype, False)
    assert models.policy_digest == models.reference_digest == weights_digest(models.policy.named_parameters(), dtype)


async def test_the_reference_is_the_initial_policy_unless_another_is_named_and_never_changes(tmp_path: Path) -> None:
    one, other = make_tiny_gpt2(tmp_path / "one"), make_tiny_gpt2(tmp_path / "other", seed=1)
    named = load_models(one, other, torch.float32, "cpu", False)
    default = load_models(other, None, torch.float32, "cpu", False)
    assert named.reference_digest == default.policy_digest != named.policy_digest
    zeros = {name: torch.zeros_like(each) for name, each in default.policy.named_parameters()}
    async with running(default) as engine:
        await engine.load_weights(zeros, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        described = engine.describe("reference")
    assert weights_digest(default.reference.named_parameters(), torch.float32) == default.reference_digest
    assert described.weights_digest == default.reference_digest
    assert described.weights.run_id == ""


@pytest.mark.parametrize("sent", ["embedding only", "head only", "both"])
async def test_a_tied_head_stays_tied_after_an_update(tmp_path: Path, sent: str) -> None:
    models = load_models(make_tiny_gpt2(tmp_path), None, torch.float32, "cpu", False)
    specs = {spec.name: spec for spec in ParameterTable(models.policy).specs}
    assert specs[HEAD] == ParameterSpec(HEAD, (257, 32), tied_to=EMBEDDING)
    assert specs[EMBEDDING].tied_to is None
    new = torch.randn(257, 32)
    names = {"embedding only": [EMBEDDING], "head only": [HEAD], "both": [EMBEDDING, HEAD]}[sent]
    async with running(models) as engine:
        tensors = {name: new.clone() for name in names}
        await engine.load_weights(tensors, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
    head, embedding = models.policy.lm_head.weight, models.policy.transformer.wte.weight
    assert head is embedding
    assert torch.equal(head, new)


async def test_an_untied_head_is_a_parameter_of_its_own(tmp_path: Path) -> None:
    models = load_models(make_tiny_gpt2(tmp_path, tie=False), None, torch.float32, "cpu", False)
    new = torch.randn(257, 32)
    embedding = models.policy.transformer.wte.weight.clone()
    async with running(models) as engine:
        assert {spec.tied_to for spec in engine.parameters()} == {None}
        await engine.load_weights({HEAD: new}, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
    assert torch.equal(models.policy.lm_head.weight, new)
    assert torch.equal(models.policy.transformer.wte.weight, embedding)


async def test_an_update_is_cast_in_place_and_changes_what_is_generated() -> None:
    policy, target = make_model("llama", dtype=torch.bfloat16), make_model("llama", seed=1)
    places = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    asked = request([1, 2], temperature=0.0, max_new_tokens=10)
    async with running(loaded(policy)) as engine:
        before = await generate(engine, asked)
        await engine.load_weights(dict(target.named_parameters()), FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        after = await generate(engine, asked)
        await engine.load_weights({}, SECOND, if_current=FIRST, in_flight=InFlight.RECOMPUTE)
        same = await generate(engine, asked)
    assert before[0].token_ids != after[0].token_ids == same[0].token_ids
    for name, parameter in policy.named_parameters():
        assert parameter.data_ptr() == places[name]
        assert torch.equal(parameter, target.get_parameter(name).bfloat16())
