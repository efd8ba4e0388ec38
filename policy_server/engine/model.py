"""A loaded causal language model, called the same way whatever its architecture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from policy_server.engine import activations, attention
from policy_server.engine import cache as caches
from policy_server.engine.lean import lean_forward
from policy_server.engine.protocol import WeightsVersion
from policy_server.engine.threads import sparing_threads

_CONTEXT_SETTINGS = ("max_position_embeddings", "max_seq_len")
_MOST_TOKENS = 2**62  # where nothing bounds them
_FALLBACK_CONTEXT = 2048  # for models without positions to run out of (ALiBi and the like)


class ServedModel:
    """A model under its name on the wire, with the version of its weights.

    Linear layers have to compute as they will from now on.
    reproducible: take no shortcut whose last bits could depend on more than weights and inputs.

    Raises ValueError for a model that can't continue from a key-value cache.
    """

    def __init__(
        self,
        name: str,
        module: PreTrainedModel,
        *,
        weights_digest: str,
        max_context_tokens: int | None = None,
        reproducible: bool = False,
    ) -> None:
        self.name = name
        self.module = module
        self.weights_digest = weights_digest
        self.version = WeightsVersion()
        # What these do to the last bits depends on what a batch was before.
        self._growing = not reproducible
        if not reproducible:
            attention.install(module)
            activations.fuse(module)
        self.device: torch.device = module.device
        self.dtype: torch.dtype = module.dtype
        accepted = inspect.signature(module.forward).parameters
        if "past_key_values" not in accepted:
            raise ValueError(f"{type(module).__name__} has no key-value cache (past_key_values); it can't be served")
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        config = module.config.get_text_config(decoder=True)
        own_limits = (getattr(config, name, None) for name in _CONTEXT_SETTINGS)
        limits = [limit for limit in (*own_limits, max_context_tokens) if limit is not None]
        self.max_context_tokens: int = min(limits, default=_FALLBACK_CONTEXT)
        self.eos_token_ids = _eos_token_ids(module, config)
        self.lean = None if reproducible or not _exact_on_cpu(module) else lean_forward(module)
        with torch.inference_mode():
            probe = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            self.vocab_size: int = self.logits(probe, torch.ones_like(probe), keep=1).shape[-1]
            one, two = (self._probed_cache_bytes(tokens) for tokens in (1, 2))
        # Some layers hold as much for any number of tokens.
        self._cache_bytes_per_token, self._cache_bytes_per_row = two - one, 2 * one - two

    def cache_bytes(self, tokens: int) -> int:
        """Most memory that a cache takes for a row that comes to have so many tokens, room to grow included.

        Layers with a sliding window may take less.
        """
        return self._cache_bytes_per_row + self._cache_bytes_per_token * (tokens + caches.SPARE_COLUMNS)

    def cached_tokens(self, memory: float, *, rows: int = 0) -> int:
        """Tokens whose keys and values fit into so many bytes, beside what rows of any length take."""
        left = memory - rows * self.cache_bytes(0)
        if left < 0 or self._cache_bytes_per_token == 0:
            return 0 if left < 0 else _MOST_TOKENS
        return int(min(left / self._cache_bytes_per_token, _MOST_TOKENS))

    def new_cache(self) -> Cache:
        """An empty cache of the shape that the model's layers want."""
        return caches.new_cache(self.module.config, growing=self._growing)

    def logits(self, token_ids: Tensor, mask: Tensor, *, keep: int, cache: Cache | None = None) -> Tensor:
        """Run token_ids [rows, new] and return the logits of the last `keep` of them: [rows, keep, vocab].

        mask: int64 [rows, cached + new], 1 = token, 0 = padding. Positions count tokens only, wherever padding is.
        """
        arguments = self.inputs(token_ids, mask)
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = keep
        logits: Tensor = self.module(**arguments, past_key_values=cache, use_cache=cache is not None).logits
        return logits[:, -keep:]

    def step(self, token_ids: Sequence[int], positions: Sequence[int], mask: Tensor, cache: Cache) -> Tensor:
        """Append a token to each row of the cache, and return the logits of what follows: [rows, vocab].

        mask: int64 [rows, cached + 1], 1 = token, 0 = padding.
        """
        column = torch.tensor(token_ids, device=self.device)
        if self.lean is None:
            return self.logits(column.unsqueeze(-1), mask, keep=1, cache=cache)[:, -1]
        with sparing_threads():
            return self.lean.logits(column, torch.tensor(positions), mask, cache)

    def _probed_cache_bytes(self, tokens: int) -> int:
        cache = caches.new_cache(self.module.config, growing=False)
        ids = torch.zeros((1, tokens), dtype=torch.long, device=self.device)
        self.logits(ids, torch.ones_like(ids), keep=1, cache=cache)
        return caches.held_bytes(cache)

    def inputs(self, token_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The arguments of a forward, with position_ids where the architecture has them."""
        arguments: dict[str, Any] = {"input_ids": token_ids, "attention_mask": mask}
        if self._takes_positions:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -token_ids.shape[-1] :]
        return arguments


def _exact_on_cpu(module: PreTrainedModel) -> bool:
    return module.device.type == "cpu" and module.dtype == torch.float32


def _eos_token_ids(module: PreTrainedModel, config: Any) -> tuple[int, ...]:
    """Every id that either of the model's configurations calls EOS."""
    found: set[int] = set()
    for source in (module.generation_config, config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return tuple(sorted(found))
