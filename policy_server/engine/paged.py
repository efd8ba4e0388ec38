"""Sequences in transformers' continuous batching: its scheduler, paged cache and attention, but our choice of tokens.

What its manager's thread would do in a loop is done here one step at a time, on the engine's own thread. So weights
change between two steps without a word to anyone, and an error is an exception and not a loop that ended. Its sampling
knows neither seeds per request nor log-probabilities before the settings; that is why tokens are chosen by the caller.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.logits_process import LogitsProcessorList

from policy_server.engine.model import ServedModel

PAGE_TOKENS = 256  # what flash attention's kernels take
FORWARD_TOKENS = 512
"""Most tokens of a forward, one for each sequence that decodes; longer prompts are read in several. Without a paged
attention kernel there is a mask of this × everything cached."""
MEMORY_SHARE = 0.5
"""Of what is free when the cache is made; scores and forwards need the rest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """What the model made of one batch. begun: sequences that it read from their first token. sampled: those that get a
    token now, in the order of the lines of logits [sampled, vocab].
    """

    begun: list[str]
    sampled: list[str]
    logits: Tensor


@dataclass(frozen=True)
class Work:
    """Tokens that one step read into caches, and sequences that got their next one out of theirs."""

    prefilled: int
    decoded: int


Choose = Callable[[Forward], Sequence[int]]


class PagedBatch:
    """Sequences of one model. A step that raises loses them all: `clear`, then go on.

    Its cache holds max_sequences whole contexts, or as much as MEMORY_SHARE allows. Raises ValueError when that isn't
    one, and for a model that gets other logits so than from its own forward.
    """

    def __init__(self, model: ServedModel, *, max_sequences: int) -> None:
        self._model = model
        self._names = map(str, itertools.count())
        self._states: dict[str, RequestState | None] = {}  # None = no forward yet
        self._chooser = _Chooser()
        plain_attention: str = model.module.config._attn_implementation
        try:
            try:
                self._open(max_sequences, whole=True)
            except MemoryError:
                _log.warning("No memory for %d whole contexts: the cache is of what there is", max_sequences)
                self._open_small(max_sequences)
            self._require_fused_attention()
            self._require_room()
            self._require_own_logits(min(2, max_sequences))
        except (MemoryError, ValueError) as error:
            model.module.set_attn_implementation(plain_attention)
            name = type(model.module).__name__
            raise ValueError(f"{name} can't run in transformers' continuous batching: {error}") from error

    @property
    def cache_limit_bytes(self) -> int:
        """Memory of the cache."""
        cache = self._processor.cache
        return int(cache.num_sectors * cache.bytes_per_sector)

    @property
    def cache_bytes(self) -> int:
        """Memory of the pages in use."""
        return self.cache_limit_bytes - int(self._processor.cache.compute_free_capacity(relative=False))

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the cache holds."""
        return int(self._processor.cache.num_blocks * PAGE_TOKENS)

    def add(self, token_ids: Sequence[int]) -> str:
        """Let a sequence join; returns its name."""
        name = next(self._names)
        self._states[name] = None
        self._manager.add_request(list(token_ids), request_id=name)
        return name

    def remove(self, names: Sequence[str]) -> None:
        """Free what is held for sequences, now or at the next step."""
        for name in names:
            del self._states[name]
            self._manager.cancel_request(name)
            # Those that gave way to others wait for one that ends by itself, which none does here.
            self._processor.scheduler.block_new_requests = False
        if names and not self._states:
            self._processor.prepare_next_batch()  # no step may come; this takes in what was removed

    def clear(self) -> None:
        """Free what is held for any sequence, also after a step that went wrong half-way."""
        for name in self._states:
            self._manager.cancel_request(name)  # it may not even have been taken in
        self._states.clear()
        self._processor.reset()

    def step(self, choose: Choose) -> Work:
        """Run one forward and give the sequences that it samples the tokens that `choose` returns for them."""
        prefilled = decoded = 0

        def chosen(batch: Sequence[FutureRequestState], logits: Tensor) -> Sequence[int]:
            nonlocal prefilled, decoded
            begun = []
            for each in batch:
                name, state = each.state.request_id, each.state
                # One that had to give way to others comes back as another state, and is read again.
                if self._states[name] is not state:
                    self._states[name] = state
                    begun.append(name)
                if state.generated_tokens:
                    decoded += 1
                else:
                    prefilled += each.query_length
            sampled = [each.state.request_id for each in batch if each.has_new_token]
            return choose(Forward(begun, sampled, logits[: len(sampled)]))

        self._chooser.choose = chosen
        if not self._processor.prepare_next_batch():
            raise RuntimeError("continuous batching scheduled none of its sequences")
        self._wait_for_weights()
        self._processor._generation_step(self._model.module)
        self._processor.update_batch()
        return Work(prefilled, decoded)

    def close(self) -> None:
        """Give the cache back; nothing else may be called afterwards."""
        self._manager.batch_processor = None
        del self._processor, self._manager, self._chooser

    def _open(self, max_sequences: int, *, whole: bool) -> None:
        model = self._model
        half = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
        config = ContinuousBatchingConfig(
            # A page that two sequences share, or that waits for another to share it, could outlive its weights.
            allow_block_sharing=False,
            page_size=PAGE_TOKENS,
            num_blocks=max_sequences * -(-model.max_context_tokens // PAGE_TOKENS) if whole else None,
            max_requests_per_batch=max_sequences,
            max_batch_tokens=max(FORWARD_TOKENS, max_sequences),
            max_memory_percent=MEMORY_SHARE,
            auto_switch_to_flash=half,  # its kernels know nothing else
            # A graph, or a batch that is prepared before the last one is done, leaves no moment to choose tokens in.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        # Sequences end when they are removed, never by themselves.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
        self._manager = cast(Any, model.module).init_continuous_batching(generation, config)
        self._manager.logit_processor = self._chooser
        # How much memory is free is asked of the current device.
        place = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), place:
            self._processor = self._manager.batch_processor = self._manager._create_batch_processor()

    def _open_small(self, max_sequences: int) -> None:
        try:
            self._open(max_sequences, whole=False)
        except (MemoryError, ValueError) as error:
            raise MemoryError("there is no memory for its cache") from error

    def _require_fused_attention(self) -> None:
        """Paged, the other kind knows nothing of what architectures do to its scores; alone, it runs no longer."""
        if self._model.module.config._attn_implementation.startswith("paged|"):
            raise ValueError("it has no fused attention")

    def _require_room(self) -> None:
        if self.max_cached_tokens < self._model.max_context_tokens:
            raise MemoryError(f"there is room to cache {self.max_cached_tokens} tokens, max_context_tokens takes more")

    def _wait_for_weights(self) -> None:
        """The forward runs on a stream of its own, new weights come on the thread's."""
        stream = self._processor.inputs_and_outputs.compute_stream
        if stream is not None:
            stream.wait_stream(torch.get_device_module(self._model.device).current_stream(self._model.device))

    def _require_own_logits(self, count: int) -> None:
        """Raise ValueError unless a prefill and a few steps give the logits of the model's own forward."""
        model = self._model
        steps = min(4, model.max_context_tokens - 1)
        length = min(8, model.max_context_tokens - steps)
        sequences = [
            [(5 * start + index) % model.vocab_size for index in range(length + steps)] for start in range(count)
        ]
        paged: dict[str, list[Tensor]] = {}

        def follow(forward: Forward) -> list[int]:
            for name, line in zip(forward.sampled, forward.logits, strict=True):
                paged[name].append(line.float())
            return [by_name[name][length - 1 + len(paged[name])] for name in forward.sampled]

        with torch.inference_mode():
            try:
                by_name = {self.add(each[:length]): each for each in sequences}
                paged.update((name, []) for name in by_name)
                while self._states:
                    self.step(follow)
                    self.remove([name for name in self._states if len(paged[name]) == steps])
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"its forward fails ({type(error).__name__}: {error})") from error
            finally:
                self.clear()
            for name, sequence in by_name.items():
                ids = torch.tensor([sequence[:-1]], device=model.device)
                own = model.logits(ids, torch.ones_like(ids), keep=steps)[0].float()
                tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(own.nan_to_num().abs().max())
                if not torch.allclose(torch.stack(paged[name]), own, rtol=0.0, atol=tolerance, equal_nan=True):
                    raise ValueError("its logits are not those of its own forward")


class _Chooser(ContinuousBatchingLogitsProcessorList):
    """Stands in for the settings of all requests, and leaves to the argmax after it one choice: the caller's."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.choose: Callable[[Sequence[FutureRequestState], Tensor], Sequence[int]] | None = None
        self._batch: Sequence[FutureRequestState] = ()

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Remember whose logits come next."""
        self._batch = requests_in_batch
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Scores [sequences, vocab] with the highest at the chosen tokens."""
        if self.choose is None:
            return scores
        chosen = torch.tensor(self.choose(self._batch, scores), dtype=torch.long, device=scores.device)
        # Prompts that are read in part have a line too, behind the others; what is taken from it is dropped.
        return torch.zeros_like(scores).scatter_(-1, chosen.unsqueeze(-1), 1.0)
