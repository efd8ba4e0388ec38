"""Log-probabilities of given completions: tokens per second over gRPC, and how far they are from a recomputation."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.benchmarks.measuring import Measurement, interleaved, log_uniform, make_table, percentile
from tests.benchmarks.roofline import Limits
from tests.support.processes import StartProcess
from trainer.clients.policy import REFERENCE, PolicyClient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PADDED, POLICY, FROZEN = "transformers forward, padded", "LogProbs of the policy", "LogProbs of the reference"
Pairs = Sequence[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Work:
    """Completions of log-uniform lengths; `batch` rows in a plain forward, which keeps the logits of every position.

    model: folder of another model than the benchmarks' own, whose weights are random; its context may cut completions.
    """

    sequences: int = 64
    prompt_tokens: int = 16
    shortest: int = 8
    longest: int = 224
    batch: int = 8
    rounds: int = 5
    model: str | None = None


@dataclass(frozen=True)
class Differences:
    """In nats, absolute: a server's log-probabilities of sampled tokens from those of a forward in float32."""

    largest: float
    mean: float
    p99: float

    @staticmethod
    def between(answered: Sequence[float], recomputed: Sequence[float]) -> Differences:
        """Token by token."""
        apart = [abs(one - other) for one, other in zip(answered, recomputed, strict=True)]
        return Differences(max(apart), statistics.fmean(apart), percentile(apart, 0.99))


@dataclass(frozen=True)
class LogProbs:
    """Rates, counted in tokens of prompts and completions, and differences by the server's dtype and RPC."""

    work: Work
    rates: Measurement
    differences: Mapping[str, Differences]
    tokens: int
    flops: float

    def show(self) -> None:
        """Print both tables."""
        self.rates.show()
        table = make_table("|difference| from a forward in fp32, nats", "", "largest", "p99", "mean")
        for name, each in self.differences.items():
            table.add_row(name, f"{each.largest:.1e}", f"{each.p99:.1e}", f"{each.mean:.1e}")
        Console().print(table)

    def record(self) -> dict[str, Any]:
        """See Report."""
        differences = {name: asdict(each) for name, each in self.differences.items()}
        return {"settings": asdict(self.work), **self.rates.record(), "differences": differences}

    def draw(self, figure: Figure) -> None:
        """See Report."""
        self.rates.draw(figure)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        roofline = self.tokens / (self.flops / limits.flops)
        return {
            f"the roofline's {roofline:,.0f} tokens/s: {name}": self.rates.median(name) / roofline
            for name in (PADDED, POLICY)
        }


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> LogProbs:
    """Of completions that the server sampled, as in training: rates in float32, differences also in bfloat16."""
    work = work or Work()
    folder = folder if work.model is None else Path(work.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    differences: dict[str, Differences] = {}
    rates: Measurement | None = None
    for dtype in ("float32", "bfloat16"):
        server = start("policy_server", "--model", str(folder), "--threads", str(threads), "--dtype", dtype)
        server.wait_serving("rlhf.policy.v1.PolicyService")
        client = PolicyClient(server.address)
        try:
            pairs, sampled = await _sampled(client, work)
            scored = _joined(await client.log_probs("", pairs))
            recomputed = _joined(_alone(model, pairs))
            differences[f"LogProbs of the policy, {dtype}"] = Differences.between(scored, recomputed)
            differences[f"Generate's own, {dtype}"] = Differences.between(_joined(sampled), recomputed)
            if rates is None:
                float32_pairs = pairs
                rates = await _rates(client, model, pairs, work)
        finally:
            await client.close()
            server.kill()
    assert rates is not None
    return LogProbs(work, rates, differences, _tokens(float32_pairs), _flops(model, float32_pairs))


async def _sampled(client: PolicyClient, work: Work) -> tuple[Pairs, list[Sequence[float]]]:
    """Prompts with completions, and the log-probabilities that came with those."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 256, (work.sequences, work.prompt_tokens), generator=generator).tolist()
    lengths = log_uniform(work.sequences, work.shortest, work.longest)
    # Not min_new_tokens, under which PROCESSED is of another distribution than LogProbs'.
    answers = await asyncio.gather(
        *(
            client.generate(prompt, seed=row, max_new_tokens=length)
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
    )
    completions = [completion for (completion,) in answers]
    pairs = [(prompt, list(each.token_ids)) for prompt, each in zip(prompts, completions, strict=True)]
    return pairs, [each.logprobs for each in completions]


async def _rates(client: PolicyClient, model: PreTrainedModel, pairs: Pairs, work: Work) -> Measurement:
    async def padded() -> float:
        await asyncio.to_thread(_padded, model, pairs, work.batch)
        return _tokens(pairs)

    async def policy() -> float:
        await client.log_probs("", pairs)
        return _tokens(pairs)

    async def reference() -> float:
        await client.log_probs(REFERENCE, pairs)
        return _tokens(pairs)

    return await interleaved(
        f"logprobs: {len(pairs)} sequences of {min(map(_length, pairs))}..{max(map(_length, pairs))} tokens, fp32",
        "tokens/s",
        {PADDED: padded, POLICY: policy, FROZEN: reference},
        rounds=work.rounds,
    )


@torch.inference_mode()
def _padded(model: PreTrainedModel, pairs: Pairs, batch: int) -> list[list[float]]:
    """The plain way: right-padded batches in the order given, logits of every position."""
    rows: list[list[float]] = []
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in part]
        token_ids = pad_sequence(sequences, batch_first=True)
        mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
        logprobs = torch.log_softmax(model(token_ids, attention_mask=mask, use_cache=False).logits[:, :-1], dim=-1)
        chosen = logprobs.gather(-1, token_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        rows += [
            row[len(prompt) - 1 : len(prompt) + len(completion) - 1].tolist()
            for row, (prompt, completion) in zip(chosen, part, strict=True)
        ]
    return rows


def _alone(model: PreTrainedModel, pairs: Pairs) -> list[list[float]]:
    """Each sequence in a forward of its own, in which there is no padding."""
    return _padded(model, pairs, 1)


def _joined(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _length(pair: tuple[list[int], list[int]]) -> int:
    return len(pair[0]) + len(pair[1])


def _tokens(pairs: Pairs) -> int:
    return sum(map(_length, pairs))


def _flops(model: PreTrainedModel, pairs: Pairs) -> float:
    """Of the linear layers: the head is needed at completion tokens alone."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D))
    head = model.get_output_embeddings().weight.numel()
    return 2.0 * (_tokens(pairs) * (weights - head) + sum(len(completion) for _, completion in pairs) * head)
