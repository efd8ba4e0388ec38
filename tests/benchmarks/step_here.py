"""Our side of the `step` benchmark: python -m tests.benchmarks.step_here FOLDER THREADS PRECISION."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator

from rlhf.memory import keep_freed_memory
from tests.benchmarks.stepping import BATCH, EPOCHS, MINI_BATCH, read_samples, serve
from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig


def main() -> None:
    folder, threads, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    keep_freed_memory()
    model, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(folder / "model") for _ in range(2))
    learner = PPOLearner(
        model,
        PPOConfig(batch_size=BATCH, mini_batch_size=MINI_BATCH, ppo_epochs=EPOCHS),
        reference=reference,
        tokenizer_pad_id=0,
        accelerator=Accelerator(mixed_precision=precision),
    )
    queries, responses, scores = read_samples(folder)
    batch = RolloutBatch(queries, responses, torch.stack(scores))

    def step() -> dict[str, Any]:
        return learner.step(batch)

    serve(step, (model, reference), folder / f"ours-{precision}.pt")


if __name__ == "__main__":
    main()
