from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from demo.base_model import Recipe, base_model
from demo.corpus import Review
from demo.data import Split

TEXTS = ["A fine film with a warm heart.", "A dull film with no heart at all.", "The café scene is a fine scene."] * 20
SPLIT = Split([Review(i, 0.0, text) for i, text in enumerate(TEXTS)], [Review(99, 0.0, "A warm film.")])
RECIPE = Recipe(vocabulary=300, layers=1, width=16, heads=2, context=32, epochs=3, batch_tokens=128, warmup_steps=2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_talkative_as_before() -> Iterator[None]:
    """The demo is a process of its own and quietens transformers for good; this process goes on to other tests."""
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_the_model_loads_in_transformers_and_knows_eos(tmp_path: Path) -> None:
    folder = base_model(tmp_path, SPLIT, RECIPE, quiet())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    text = "A café \u2013 and \U0001f3ac"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_second_run_uses_the_cache_and_another_recipe_does_not(tmp_path: Path) -> None:
    console = quiet()
    folder = base_model(tmp_path, SPLIT, RECIPE, console)
    assert base_model(tmp_path, SPLIT, RECIPE, console) == folder
    assert "cached" in console.file.getvalue()  # type: ignore[attr-defined]
    assert base_model(tmp_path, SPLIT, Recipe(**{**vars(RECIPE), "seed": 1}), console) != folder


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    weights = [
        (base_model(tmp_path / name, SPLIT, RECIPE, quiet()) / "model.safetensors").read_bytes() for name in "ab"
    ]
    assert weights[0] == weights[1]


def test_an_interrupted_training_leaves_no_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demo.base_model.PreTrainedTokenizerFast.save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        base_model(tmp_path, SPLIT, RECIPE, quiet())
    monkeypatch.undo()
    folder = base_model(tmp_path, SPLIT, RECIPE, quiet())
    assert (folder / "tokenizer.json").is_file()
