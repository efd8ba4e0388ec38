"""The attention of one query is torch's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from policy_server.engine import attention
from tests.policy_server.engine.architectures import make_model


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_gives_what_torch_gives(key_heads: int, masked: bool, scaling: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=random)
    # Views of larger memory, as the cache gives.
    key = torch.randn(5, key_heads, 20, 8, generator=random)[:3, :, 2:13]
    value = torch.randn(5, key_heads, 20, 6, generator=random)[:3, :, 2:13]
    mask = torch.rand(3, 1, 1, 11, generator=random) < 0.6
    mask[..., -1] = True
    module: Any = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True)
    given = (module, query, key, value, mask if masked else None)
    ours, _ = attention._attention(*given, scaling=scaling)
    theirs, _ = sdpa_attention_forward(*given, scaling=scaling)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_models_that_use_torchs_attention_in_full_precision_get_it() -> None:
    assert attention.install(make_model("llama"))
    assert not attention.install(make_model("llama", dtype=torch.bfloat16))
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    assert not attention.install(eager)
