"""What the demo's reward can be, beyond what --reward of the reward server takes by itself.

`model` is trained here on the human ratings, `composite` is VADER, a length and that model, `remote` is a reward server
in front of another one, and `go` (or another language) is the example server in that language.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.data import Split

EXAMPLES = Path(__file__).resolve().parent.parent / "reward_server" / "examples"
PROGRAMS = {"go": ("bin/reward",)}
"""Example servers that the demo starts by itself, by language: the program, relative to its folder."""

_TARGET_WORDS = 20


class RewardError(Exception):
    """The reward cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class RewardPlan:
    """How the reward is served.

    name: for people. arguments: of the reward server. behind: of a second one, whose address becomes the option
    `target` of the first. program: a server that is not ours, in place of both.
    """

    name: str
    arguments: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    program: tuple[str, ...] = field(default=())


def needs_ratings(reward: str, options: str | None) -> bool:
    """Whether `plan_reward` wants the reviews, to train a model on their ratings."""
    return reward in ("model", "composite") and options is None


def plan_reward(reward: str, options: str | None, cache: Path, split: Split | None, console: Console) -> RewardPlan:
    """What to start for `--reward`; with options it means what it means to the reward server.

    Raises RewardError when an example is not built, or the model can't be trained.
    """
    if options is not None:
        return RewardPlan(reward, ("--reward", reward, "--reward-options", options))
    if reward in PROGRAMS:
        return RewardPlan(f"the example in {reward}", program=_program(reward))
    if reward == "remote":
        return RewardPlan("vader, behind a remote", ("--reward", "remote"), behind=("--reward", "vader"))
    if needs_ratings(reward, options):
        assert split is not None
        model = _rating_model(cache, split, console)
        made = model if reward == "model" else _mixture(model)
        return RewardPlan(reward, ("--reward", reward, "--reward-options", json.dumps(made)))
    return RewardPlan(reward, ("--reward", reward))


def _mixture(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "components": [
            {"name": "praise", "reward": "vader", "weight": 0.5},
            {
                "name": "length",
                "reward": "length",
                "options": {"target": _TARGET_WORDS},
                "weight": 0.25,
                "clip": [-1, 1],
            },
            {"name": "liking", "reward": "model", "options": model, "weight": 0.5},
        ]
    }


def _program(language: str) -> tuple[str, ...]:
    program = EXAMPLES / language / PROGRAMS[language][0]
    if not program.is_file():
        raise RewardError(f"{program} is not there; build it first: make examples EXAMPLES={language}")
    return (str(program), *PROGRAMS[language][1:])


def _rating_model(cache: Path, split: Split, console: Console) -> dict[str, Any]:
    """Options of the model kind for a model of the human ratings, trained the first time."""
    folder = cache / "rating-model"
    if not (folder / "config.json").is_file():
        console.print("Training a reward model on the human ratings (once) …")
        table = cache / "ratings.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "rating"])
            writer.writerows([review.text, review.rating] for review in split.train)
        command = [sys.executable, "-m", "reward_server.train_model", "--data", str(table), "--output", str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise RewardError("the reward model could not be trained; its output above says why")
    return {"model": str(folder)}
