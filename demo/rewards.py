"""What the demo's reward can be, beyond what --reward of the reward server takes by itself.

`model` is trained here on the human ratings, `composite` is VADER, a length and that model, `remote` is a reward server
in front of another one, and `go` is the example server in that language.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.data import Split
from rlhf import __version__

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
    program: tuple[str, ...] = ()


def needs_ratings(reward: str, options: str | None) -> bool:
    """Whether `plan_reward` wants the reviews, to train a model on their ratings."""
    return reward in ("model", "composite") and options is None


def plan_reward(reward: str, options: str | None, cache: Path, split: Split | None, console: Console) -> RewardPlan:
    """What to start for `--reward`; with options it means what it means to the reward server.

    Raises RewardError when an example is not built.
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
    # Importing torch takes seconds that the other rewards need not spend.
    from reward_server.train_model.ratings import Rated
    from reward_server.train_model.training import FROM_SCRATCH, REPORT_FILE, Recipe, Report, train_reward_model

    recipe = Recipe()
    made_by = hashlib.sha256(f"{__version__} {recipe} {FROM_SCRATCH}".encode()).hexdigest()[:12]
    folder = cache / f"rating-model-{made_by}"
    if (folder / REPORT_FILE).is_file():
        report = Report(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    else:
        console.print("Training a reward model on the human ratings (once) …")
        train, held_out = (
            [Rated(review.text, review.rating) for review in part] for part in (split.train, split.held_out)
        )
        report = train_reward_model(train, held_out, folder, recipe)
    console.print(f"Reward model: correlation with {report.held_out} held-out human ratings {report.pearson:.2f}")
    return report.unit_options(folder)
