"""Record what TRL 0.11.4's `PPOTrainer.step` does, for `test_parity.py` to compare ours with.

Runs in the environment of requirements-trl.txt, never in ours:

    python make_golden.py FOLDER

writes one model, one reference, the inputs of two steps, and for every case of `CASES` TRL's statistics, its tensors
and the parameters after both steps. Everything is fp32, on one thread.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import masked_whiten
from trl.trainer import ppo_trainer

STEPS = 2
BATCH = 16
VOCABULARY = 32
PAD = 0


@dataclass
class Case:
    """Settings that differ from TRL's defaults, and what the case needs besides."""

    settings: dict[str, Any] = field(default_factory=dict)
    response_masks: bool = False
    halve_learning_rate: bool = False
    """A scheduler that halves the learning rate at every step."""


CASES = {
    "kl": Case(),
    "abs": Case({"kl_penalty": "abs"}),
    "mse": Case({"kl_penalty": "mse"}),
    "full": Case({"kl_penalty": "full"}),
    "full_masked": Case({"kl_penalty": "full", "gradient_accumulation_steps": 2}, response_masks=True),
    "scaling": Case({"use_score_scaling": True}),
    "scaling_norm": Case({"use_score_scaling": True, "use_score_norm": True}),
    "scaling_norm_clip": Case({"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.5}),
    "clip": Case({"score_clip": 0.5}),
    "response_masks": Case(response_masks=True),
    "accumulation": Case({"gradient_accumulation_steps": 2}),
    "early_stopping": Case({"early_stopping": True, "target_kl": 1e-4}),
    "ratio_threshold": Case({"ratio_threshold": 1.0005}),
    "whiten_rewards": Case({"whiten_rewards": True, "gamma": 0.98, "lam": 0.9}),
    "fixed_kl": Case({"adap_kl_ctrl": False, "init_kl_coef": 0.05, "seed": 7}),
    "adaptive_kl": Case({"target": 0.45, "horizon": 100.0}),
    "grad_norm": Case({"max_grad_norm": 0.5, "vf_coef": 0.5, "cliprange": 0.0005, "cliprange_value": 0.001}),
    "one_mini_batch": Case({"mini_batch_size": BATCH, "ppo_epochs": 2}, halve_learning_rate=True),
}


def make_models(folder: Path) -> None:
    """A GPT-2 with value head and a reference some way off, as folders that both libraries load."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=PAD,
        eos_token_id=PAD,
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLMWithValueHead(GPT2LMHeadModel(config), v_head_init_strategy="normal")
    torch.nn.init.constant_(policy.v_head.summary.bias, 0.1)
    for name in ("model", "reference"):
        config.save_pretrained(folder / name)
        parameters = {
            key.removeprefix("pretrained_model."): value.detach().clone().contiguous()
            for key, value in policy.named_parameters()
        }
        save_file(parameters, folder / name / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.02 * torch.randn_like(parameter)


def make_inputs(path: Path) -> None:
    """Two steps of samples with uneven lengths, from prompts of 1 to 8 tokens and responses of 1 to 8."""
    generator = np.random.RandomState(1)
    steps = []
    for _ in range(STEPS):
        lengths = [1, *generator.randint(2, 9, BATCH - 2), 8]
        responses = [generator.randint(1, VOCABULARY, length).tolist() for length in lengths]
        masks = [generator.randint(0, 2, length).tolist() for length in lengths]
        for mask in masks:
            mask[generator.randint(len(mask))] = 1
        steps.append(
            {
                "queries": [generator.randint(1, VOCABULARY, generator.randint(1, 9)).tolist() for _ in range(BATCH)],
                "responses": responses,
                "scores": generator.normal(0.5, 1.5, BATCH).astype(np.float32).tolist(),
                "response_masks": masks,
            }
        )
    path.write_text(json.dumps(steps))


class Moments:
    """TRL's running moments as tensors: `step` calls `.to` on them, and TRL 0.11.4 keeps floats, which have none."""

    def __init__(self, moments: Any) -> None:
        self.moments = moments

    def update(self, scores: torch.Tensor) -> Any:
        return self.moments.update(scores)

    @property
    def mean(self) -> torch.Tensor:
        return torch.tensor(self.moments.mean)

    @property
    def std(self) -> torch.Tensor:
        return torch.tensor(self.moments.std)


def whiten_within_the_mask(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """TRL's whitening without what it leaves on padding.

    With `shift_mean=False` (`whiten_rewards`) padding would keep a reward other than 0, which the advantages then carry
    back into the response. Otherwise it changes nothing that anyone reads.
    """
    return masked_whiten(values, mask, shift_mean) * mask


def load(folder: Path) -> AutoModelForCausalLMWithValueHead:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    assert model.v_head.summary.bias.item() != 0
    return model


def record(folder: Path, name: str, case: Case) -> None:
    """Run one case and write `name`.json (settings, scalars, shuffles) and `name`.safetensors (tensors)."""
    inputs = json.loads((folder / "inputs.json").read_text())
    settings = {"batch_size": BATCH, "mini_batch_size": 4, **case.settings}
    model = load(folder / "model")
    backend = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token=str(PAD)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=str(PAD))
    optimizer = scheduler = None
    if case.halve_learning_rate:
        optimizer = torch.optim.Adam(model.parameters(), lr=1.41e-5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trainer = PPOTrainer(
        PPOConfig(**settings, exp_name="golden"),
        model,
        load(folder / "reference"),
        tokenizer,
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )
    if case.settings.get("use_score_scaling"):
        trainer.running = Moments(trainer.running)
    ppo_trainer.masked_whiten = whiten_within_the_mask
    # TRL's own is an iterator that the first update exhausts: from the second on, nothing is clipped.
    trainer.model_params = list(trainer.model.parameters())

    seen: dict[str, torch.Tensor] = {}
    shuffles: list[list[int]] = []
    _record_calls(trainer, seen)
    shuffle = np.random.permutation

    def recorded_shuffle(length: int) -> np.ndarray:
        order = shuffle(length)
        shuffles.append(order.tolist())
        return order

    np.random.permutation = recorded_shuffle
    try:
        steps, tensors = [], {}
        for number, step in enumerate(inputs, start=1):
            statistics = trainer.step(
                [torch.tensor(ids) for ids in step["queries"]],
                [torch.tensor(ids) for ids in step["responses"]],
                [torch.tensor(score) for score in step["scores"]],
                [torch.tensor(mask) for mask in step["response_masks"]] if case.response_masks else None,
            )
            arrays = {key: value for key, value in statistics.items() if isinstance(value, np.ndarray) and value.ndim}
            steps.append(
                {
                    "statistics": {
                        key: float(value)
                        for key, value in statistics.items()
                        if key not in arrays and not key.startswith("time/")
                    },
                    "kl_coef_after": float(trainer.kl_ctl.value),
                    "shuffles": shuffles[:],
                }
            )
            shuffles.clear()
            tensors |= {f"step{number}/statistics/{key}": torch.from_numpy(value) for key, value in arrays.items()}
            tensors |= {f"step{number}/{key}": value for key, value in seen.items()}
    finally:
        np.random.permutation = shuffle
    tensors |= {f"parameters/{key}": value.detach() for key, value in trainer.model.named_parameters()}
    tensors = {key: value.to(torch.float32).contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors")
    document = {
        "settings": settings,
        "response_masks": case.response_masks,
        "halve_learning_rate": case.halve_learning_rate,
        "steps": steps,
    }
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _record_calls(trainer: PPOTrainer, seen: dict[str, torch.Tensor]) -> None:
    """Note what goes into and comes out of TRL's rewards and advantages."""
    compute_rewards, compute_advantages = trainer.compute_rewards, trainer.compute_advantages

    def rewards(scores: Any, logprobs: Any, ref_logprobs: Any, masks: Any) -> Any:
        result = compute_rewards(scores, logprobs, ref_logprobs, masks)
        seen.update(scores=scores, masks=masks, rewards=result[0], kl=result[2])
        return result

    def advantages(values: Any, rewards: Any, masks: Any) -> Any:
        result = compute_advantages(values, rewards, masks)
        seen.update(zip(("values", "advantages", "returns"), result, strict=True))
        return result

    trainer.compute_rewards, trainer.compute_advantages = rewards, advantages


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make_models(folder)
    make_inputs(folder / "inputs.json")
    for name, case in CASES.items():
        record(folder, name, case)


if __name__ == "__main__":
    main()
