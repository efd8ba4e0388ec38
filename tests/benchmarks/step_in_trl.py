"""TRL 0.11.4's side of the `step` benchmark; runs in the environment of tests/trainer/parity/requirements-trl.txt.

python step_in_trl.py FOLDER THREADS
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from stepping import BATCH, EPOCHS, MINI_BATCH, read_samples, serve
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    warnings.simplefilter("ignore")
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    model, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "model")) for _ in range(2))
    assert model.v_head.summary.bias.item() != 0, "TRL did not load the value head"
    backend = Tokenizer(models.WordLevel({"0": 0}, unk_token="0"))
    trainer = PPOTrainer(
        PPOConfig(batch_size=BATCH, mini_batch_size=MINI_BATCH, ppo_epochs=EPOCHS, exp_name="benchmark"),
        model,
        reference,
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0"),
    )
    samples = read_samples(folder)
    serve(lambda: trainer.step(*samples), (trainer.model, trainer.ref_model), folder / "trl.pt")


if __name__ == "__main__":
    main()
