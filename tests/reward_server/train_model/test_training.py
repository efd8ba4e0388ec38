"""Training itself, on a few made-up reviews."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from reward_server.kinds import Limits, Sample
from reward_server.kinds.model import ModelOptions, ModelReward
from reward_server.results import Scored
from reward_server.train_model.ratings import Rated, TrainingDataError, split
from reward_server.train_model.training import REPORT_FILE, Recipe, Report, train_reward_model
from tests.reward_server.kinds.small_classifiers import make_classifier

WORDS = {"dreadful": 1.0, "dull": 2.0, "fair": 3.0, "good": 4.0, "splendid": 5.0}
THINGS = ("film", "plot", "cast", "score", "end", "start", "hero", "joke")
RATED = [
    Rated(f"The {one} is {word} and so is the {other}", rating)
    for (word, rating), one, other in itertools.product(WORDS.items(), THINGS, THINGS)
    if one != other
]
FEW = RATED[::5]
QUICK = Recipe(epochs=6, batch_size=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("trained") / "model"
    return folder, train_reward_model(*split(RATED, held_out=0.2), folder, QUICK)


def test_it_learns_what_is_to_be_learned(trained: tuple[Path, Report]) -> None:
    _, report = trained
    assert report.train + report.held_out == len(RATED)
    assert report.pearson is not None
    assert report.pearson > 0.9
    assert report.spearman is not None
    assert report.spearman > 0.9
    assert report.rmse < report.rmse_constant / 2


def test_the_report_lies_beside_the_model(trained: tuple[Path, Report]) -> None:
    folder, report = trained
    assert json.loads((folder / REPORT_FILE).read_text()) == dataclasses.asdict(report)


async def test_the_model_kind_serves_it_in_the_ratings_units_or_from_minus_1_to_1(
    trained: tuple[Path, Report],
) -> None:
    folder, report = trained
    worst, best = (f"The film is {word} and so is the end" for word in ("dreadful", "splendid"))
    for options, low, high in ((report.options(folder), 1.0, 5.0), (report.unit_options(folder), -1.0, 1.0)):
        reward = ModelReward(ModelOptions(**options), Limits())
        await reward.start()
        outcomes = await reward.score([Sample("", worst), Sample("", best)], None)
        await reward.close()
        bad, good = (outcome.reward for outcome in outcomes if isinstance(outcome, Scored))
        middle = (low + high) / 2
        assert low - 1 < bad < middle < good < high + 1


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    train, held_out = split(FEW, held_out=0.2)
    quick = Recipe(epochs=1)
    for name in ("one", "other"):
        train_reward_model(train, held_out, tmp_path / name, quick)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_base_is_fine_tuned_whatever_labels_it_had(architecture: str, tmp_path: Path) -> None:
    base = make_classifier(tmp_path / "base", architecture, labels=("a", "b", "c"))
    train, held_out = split(FEW, held_out=0.2)
    report = train_reward_model(
        train, held_out, tmp_path / "tuned", Recipe(epochs=1, max_tokens=48), base=str(base), label="liking"
    )
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["id2label"] == {"0": "liking"}
    assert report.held_out == len(held_out)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    train, held_out = split(FEW, held_out=0.2)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    same = [Rated(each.text, 3.0) for each in train]
    for arguments, says in (
        ((train, [], tmp_path / "a"), "0 held out: both are needed"),
        ((same, held_out, tmp_path / "a"), "every rating is 3: there is nothing to learn"),
        ((train, held_out, taken), "taken is there already and not an empty folder"),
        ((train, held_out, taken / "notes.txt" / "model"), "cannot be written: "),
    ):
        with pytest.raises(TrainingDataError, match=says):
            train_reward_model(*arguments)
    with pytest.raises(TrainingDataError, match="the base nowhere cannot be loaded"):
        train_reward_model(train, held_out, tmp_path / "a", base="nowhere")
    with pytest.raises(TrainingDataError, match="loss is not finite"):
        train_reward_model(train, held_out, tmp_path / "a", Recipe(epochs=2, learning_rate=1e30))
    assert not (tmp_path / "a").exists()
    assert (taken / "notes.txt").read_text() == "mine"
