"""Tokens per second of a rollout: the policy server over gRPC against transformers' own static batch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

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

    try:
        return await interleaved(
            f"rollout: {PROMPTS} prompts x {PROMPT_TOKENS} tokens, {SHORTEST}..{LONGEST} new tokens, fp32",
            "tokens/s",
            {"transformers generate, static batch": static, "policy server over gRPC": served},
        )
    finally:
        await client.close()
