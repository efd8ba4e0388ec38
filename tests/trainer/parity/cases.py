"""TRL's recorded steps, and the same steps made by ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig
from trainer.ppo.statistics import Statistics

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
PAD = 0


@dataclass(frozen=True)
class Golden:
    """One case as TRL ran it."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]
    inputs: list[dict[str, Any]]

    @property
    def steps(self) -> range:
        return range(1, len(self.inputs) + 1)

    def scalars(self, step: int) -> dict[str, float]:
        return self.document["steps"][step - 1]["statistics"]

    def shuffles(self, step: int) -> list[list[int]]:
        return self.document["steps"][step - 1]["shuffles"]

    def arrays(self, step: int) -> dict[str, Tensor]:
        prefix = f"step{step}/statistics/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def parameters(self) -> dict[str, Tensor]:
        prefix = "parameters/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def responses_of(self, values: Tensor, step: int) -> list[Tensor]:
        """TRL's [batch, L − 1] over whole rows → its response tokens alone, one [t_i] per sample."""
        inputs = self.inputs[step - 1]
        return [
            row[len(query) - 1 : len(query) - 1 + len(response)]
            for row, query, response in zip(values, inputs["queries"], inputs["responses"], strict=True)
        ]

    def trained_tokens_of(self, values: Tensor, step: int) -> list[Tensor]:
        """TRL's flat statistic over every position of every mini-batch → the tokens trained on, one per sample."""
        masks = self.tensors[f"step{step}/masks"].bool()
        order = torch.tensor([sample for shuffle in self.shuffles(step) for sample in shuffle])
        rows = values.view(len(order), -1)
        return [row[masks[sample]] for row, sample in zip(rows, order, strict=True)]


@dataclass(frozen=True)
class Ours:
    """The same case as we ran it."""

    statistics: list[Statistics]
    kl_coefficients: list[float]
    parameters: dict[str, Tensor]
    initial: dict[str, Tensor]


def load_golden(name: str, folder: Path = GOLDEN) -> Golden:
    return Golden(
        document=json.loads((folder / f"{name}.json").read_text()),
        tensors=load_file(folder / f"{name}.safetensors"),
        inputs=json.loads((folder / "inputs.json").read_text()),
    )


def run_ours(golden: Golden) -> Ours:
    document = golden.document
    config = PPOConfig(**document["settings"])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "model")
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = scheduler = None
    if document["halve_learning_rate"]:
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    learner = PPOLearner(
        model,
        config,
        reference=AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "reference"),
        tokenizer_pad_id=PAD,
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )
    statistics, coefficients = [], []
    for step in golden.inputs:
        statistics.append(
            learner.step(
                RolloutBatch(
                    queries=[torch.tensor(ids) for ids in step["queries"]],
                    responses=[torch.tensor(ids) for ids in step["responses"]],
                    scores=torch.tensor(step["scores"]),
                    response_masks=[torch.tensor(mask) for mask in step["response_masks"]]
                    if document["response_masks"]
                    else None,
                )
            )
        )
        coefficients.append(learner.kl_coefficient)
    return Ours(
        statistics=statistics,
        kl_coefficients=coefficients,
        parameters={name: parameter.detach() for name, parameter in model.named_parameters()},
        initial=initial,
    )
