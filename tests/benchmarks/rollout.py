"""Tokens per second of a rollout: the policy server over gRPC against transformers' static and continuous batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from tests.benchmarks.measuring import Measurement, interleaved
from tests.support.processes import StartProcess
from trainer.clients.policy import PolicyClient

PROMPTS, PROMPT_TOKENS, SHORTEST, LONGEST = 64, 16, 8, 128


def _lengths() -> list[int]:
    """Log-uniform between SHORTEST and LONGEST, the skew of real completions; the same in every run."""
    uniform = torch.rand(PROMPTS, generator=torch.Generator().manual_seed(0))
    return [round(SHORTEST * (LONGEST / SHORTEST) ** u) for u in uniform.tolist()]


async def measure(folder: Path, start: StartProcess, threads: int) -> Measurement:
    """Each prompt has its own length limit, which a static batch can't stop at: it decodes to the longest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 256, (PROMPTS, PROMPT_TOKENS), generator=generator)
    lengths = _lengths()
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
                min_new_tokens=LONGEST,
                max_new_tokens=LONGEST,
                pad_token_id=0,
            )
        return float(sum(lengths))  # what lies beyond a row's own length is waste, not work

    async def static() -> float:
        return await asyncio.to_thread(generate)

    batched = _continuous(folder, prompts.tolist(), lengths)

    async def continuous() -> float:
        return await asyncio.to_thread(batched)

    try:
        return await interleaved(
            f"rollout: {PROMPTS} prompts x {PROMPT_TOKENS} tokens, {SHORTEST}..{LONGEST} new tokens, fp32",
            "tokens/s",
            {
                "transformers, continuous batching": continuous,
                "transformers generate, static batch": static,
                "policy server over gRPC": served,
            },
        )
    finally:
        await client.close()


def _continuous(folder: Path, prompts: Sequence[list[int]], lengths: Sequence[int]) -> Callable[[], float]:
    """The same work by transformers' continuous batching. Its thread ends with each call: an idle one takes a core."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rollout() -> float:
        made = 0
        with model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=True, top_k=0, max_new_tokens=LONGEST, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False),
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
