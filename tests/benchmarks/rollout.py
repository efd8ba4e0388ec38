"""Tokens per second of a rollout: the policy server over gRPC, transformers' two kinds of batches, and a bare loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, GPT2Config

from tests.benchmarks.bare_loop import BareLoop
from tests.benchmarks.measuring import Measurement, interleaved, log_uniform
from tests.benchmarks.roofline import Limits
from tests.support.processes import StartProcess
from trainer.clients.policy import PolicyClient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTINUOUS, STATIC = "transformers, continuous batching", "transformers generate, static batch"
BARE, SERVED = "bare loop, in process", "policy server over gRPC"


@dataclass(frozen=True)
class Work:
    """Prompts of `prompt_tokens` each, and log-uniform numbers of new tokens between `shortest` and `longest`."""

    prompts: int = 64
    prompt_tokens: int = 16
    shortest: int = 8
    longest: int = 128
    rounds: int = 5

    @property
    def lengths(self) -> list[int]:
        """New tokens of each prompt."""
        return log_uniform(self.prompts, self.shortest, self.longest)


@dataclass(frozen=True)
class Rollouts:
    """Rates, and what the work takes of arithmetic and memory."""

    work: Work
    rates: Measurement
    config: GPT2Config

    def show(self) -> None:
        """Print the table."""
        self.rates.show()

    def record(self) -> dict[str, Any]:
        """See Report."""
        shares = {f"{SERVED} / {name}": self.rates.ratio(SERVED, name) for name in (CONTINUOUS, STATIC, BARE)}
        return {"settings": asdict(self.work), **self.rates.record(), "shares": shares}

    def draw(self, figure: Figure) -> None:
        """See Report."""
        self.rates.draw(figure)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        roofline = sum(self.work.lengths) / least_seconds(self.config, self.work, limits)
        return {
            f"the bare loop's rate: {SERVED}": self.rates.ratio(SERVED, BARE),
            f"the roofline's {roofline:,.0f} tokens/s: {SERVED}": self.rates.median(SERVED) / roofline,
            f"the roofline's {roofline:,.0f} tokens/s: {BARE}": self.rates.median(BARE) / roofline,
        }


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> Rollouts:
    """Each prompt has its own length limit, which a static batch can't stop at: it decodes to the longest."""
    work = work or Work()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 256, (work.prompts, work.prompt_tokens), generator=generator)
    lengths = work.lengths
    server = start("policy_server", "--model", str(folder), "--threads", str(threads))
    server.wait_serving("rlhf.policy.v1.PolicyService")
    client = PolicyClient(server.address)

    async def served() -> float:
        completions = await asyncio.gather(
            *(
                client.generate(prompt.tolist(), seed=row, max_new_tokens=length, min_new_tokens=length)
                for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            )
        )
        return float(sum(len(each.token_ids) for (each,) in completions))

    def generate() -> float:
        with torch.inference_mode():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=work.longest,
                max_new_tokens=work.longest,
                pad_token_id=0,
            )
        return float(sum(lengths))  # what lies beyond a row's own length is waste, not work

    loop = BareLoop(model, rows=work.prompts, prompt_tokens=work.prompt_tokens, most_new_tokens=work.longest)

    def loop_alone() -> float:
        tokens, _ = loop.complete(prompts, lengths, torch.rand(work.prompts, work.longest))
        return float(sum(map(len, tokens)))

    batched = _continuous(folder, prompts.tolist(), lengths, work.longest)
    try:
        rates = await interleaved(
            f"rollout: {work.prompts} prompts x {work.prompt_tokens} tokens, "
            f"{work.shortest}..{work.longest} new tokens, fp32",
            "tokens/s",
            {
                CONTINUOUS: lambda: asyncio.to_thread(batched),
                STATIC: lambda: asyncio.to_thread(generate),
                SERVED: served,
                BARE: lambda: asyncio.to_thread(loop_alone),
            },
            rounds=work.rounds,
        )
    finally:
        await client.close()
    return Rollouts(work, rates, model.config)


def least_seconds(config: GPT2Config, work: Work, limits: Limits) -> float:
    """The roofline of the work: each step's products at the peak, or its weights, keys and values read at the peak.

    Prompts are read in one forward, which makes the first tokens; a step then makes one for each row that goes on.
    """
    width, layers = config.n_embd, config.n_layer
    body, head = 12 * layers * width**2, config.vocab_size * width  # weights of the linear layers
    seconds = limits.seconds(
        2.0 * work.prompts * (work.prompt_tokens * body + head),
        4.0 * (body + head),
    )
    lengths = work.lengths
    for made in range(1, work.longest):
        rows = sum(length > made for length in lengths)
        attended = 2.0 * rows * (work.prompt_tokens + made) * width * layers  # elements of keys and values
        if rows:
            seconds += limits.seconds(2 * rows * (body + head) + 2 * attended, 4 * (body + head + attended))
    return seconds


def _continuous(
    folder: Path, prompts: Sequence[list[int]], lengths: Sequence[int], longest: int
) -> Callable[[], float]:
    """The same work by transformers' continuous batching. Its thread ends with each call: an idle one takes a core."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    blocks = -(-(max(map(len, prompts)) + longest) // ContinuousBatchingConfig().page_size)

    def rollout() -> float:
        made = 0
        with model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=-1),
            # Room for all at once. By itself it would take most of the machine's free memory.
            continuous_batching_config=ContinuousBatchingConfig(
                allow_block_sharing=False,
                num_blocks=len(prompts) * blocks,
                max_batch_tokens=sum(map(len, prompts)),
            ),
            persistent_manager=True,
        ) as manager:
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length)
            for _ in prompts:
                result = manager.get_result(timeout=600)
                assert result is not None
                assert result.error is None
                made += len(result.generated_tokens)
        assert made == sum(lengths)
        return float(made)

    return rollout
