"""Regression of ratings by a sequence classifier with one label, fine-tuned from a base or trained from scratch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reward_server.kinds import RewardLoadError
from reward_server.kinds.batching import Row
from reward_server.kinds.classifier import Classifier, place
from reward_server.train_model.agreement import pearson, rmse, spearman
from reward_server.train_model.ratings import Rated, TrainingDataError
from reward_server.train_model.small import small_config, train_tokenizer
from rlhf.logs import get_logger

_log = get_logger(__name__)

REPORT_FILE = "metrics.json"

_WARMUP = 0.06
_WEIGHT_DECAY = 0.05
_SCORING_TOKENS = 8192


@dataclass(frozen=True)
class Pace:
    """What a training needs that depends on what the model knows before.

    masked: share of each text's tokens that it does not see, so that it does not lean on single words.
    threads: of the CPU; None = as many as torch takes by itself.
    """

    epochs: int
    learning_rate: float
    masked: float
    threads: int | None


# On matrices as small as these, threads wait for each other longer than they work.
FROM_SCRATCH = Pace(epochs=4, learning_rate=2e-3, masked=0.25, threads=1)
FROM_A_BASE = Pace(epochs=3, learning_rate=2e-5, masked=0.0, threads=None)


@dataclass(frozen=True)
class Recipe:
    """How to train. epochs, learning_rate, threads: None = what FROM_SCRATCH or FROM_A_BASE says.

    max_tokens: what is longer loses its beginning, as in serving.
    """

    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    max_tokens: int = 128
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Report:
    """How the model agrees with the held-out ratings, in their units, and how its logit becomes a rating.

    pearson, spearman: None where a side is constant. rmse_constant: of answering the training texts' mean rating
    always. The rating is logit × scale + shift; rating_least and rating_most are the training texts'.
    """

    train: int
    held_out: int
    pearson: float | None
    spearman: float | None
    rmse: float
    rmse_constant: float
    scale: float
    shift: float
    rating_least: float
    rating_most: float
    parameters: int
    seconds: float

    def options(self, model: Path) -> dict[str, Any]:
        """Options of `--reward model` for rewards in the rating's units."""
        return {"model": str(model), "scale": self.scale, "shift": self.shift}

    def unit_options(self, model: Path) -> dict[str, Any]:
        """Options for rewards of −1 where the rating is the least, and 1 where it is the most."""
        half, middle = (self.rating_most - self.rating_least) / 2, (self.rating_most + self.rating_least) / 2
        return {"model": str(model), "scale": self.scale / half, "shift": (self.shift - middle) / half}


def train_reward_model(
    train: Sequence[Rated],
    held_out: Sequence[Rated],
    output: Path,
    recipe: Recipe | None = None,
    *,
    base: str | None = None,
    label: str = "rating",
) -> Report:
    """Write a model and its tokenizer to the folder `output`, and the report to metrics.json in it.

    base: what to fine-tune; None = a small model from scratch. label: what the config calls the one logit, which is the
    rating in standard deviations from the mean. Raises TrainingDataError.
    """
    recipe = recipe or Recipe()
    _require(train, held_out, output)
    began = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(recipe.seed)
    pace = FROM_A_BASE if base else FROM_SCRATCH
    ratings = np.array([each.rating for each in train])
    mean, deviation = float(ratings.mean()), float(ratings.std())
    classifier = _from_base(base, recipe, label) if base else _from_scratch(train, recipe, label)
    config = classifier.model.config
    config.rating_mean, config.rating_deviation = mean, deviation
    rows = _rows(classifier, train, recipe)
    with _threads(recipe.threads or pace.threads):
        _fit(classifier, rows, (ratings - mean) / deviation, recipe, pace)
    predicted = _predict(classifier, _rows(classifier, held_out, recipe)) * deviation + mean
    actual = np.array([each.rating for each in held_out])
    report = Report(
        train=len(train),
        held_out=len(held_out),
        pearson=_defined(pearson(predicted, actual)),
        spearman=_defined(spearman(predicted, actual)),
        rmse=rmse(predicted, actual),
        rmse_constant=rmse(np.full_like(actual, mean), actual),
        scale=deviation,
        shift=mean,
        rating_least=float(ratings.min()),
        rating_most=float(ratings.max()),
        parameters=sum(parameter.numel() for parameter in classifier.model.parameters()),
        seconds=round(time.monotonic() - began, 1),
    )
    _save(classifier, report, output)
    return report


def _require(train: Sequence[Rated], held_out: Sequence[Rated], output: Path) -> None:
    if not train or not held_out:
        raise TrainingDataError(f"{len(train)} texts to train on and {len(held_out)} held out: both are needed")
    if len({each.rating for each in train}) == 1:
        raise TrainingDataError(f"every rating is {train[0].rating:g}: there is nothing to learn")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TrainingDataError(f"{output} is there already and not an empty folder")
    try:
        # Now rather than after the training.
        output.parent.mkdir(parents=True, exist_ok=True)
        _folder_beside(output).cleanup()
    except OSError as error:
        raise TrainingDataError(f"{output} cannot be written: {error.strerror}") from error


def _folder_beside(output: Path) -> tempfile.TemporaryDirectory[str]:
    """On the same file system, so that what is made in it can become `output` at once."""
    return tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _defined(correlation: float) -> float | None:
    return correlation if math.isfinite(correlation) else None


def _from_scratch(train: Sequence[Rated], recipe: Recipe, label: str) -> Classifier:
    tokenizer = train_tokenizer([each.text for each in train], recipe.max_tokens)
    model = ModernBertForSequenceClassification(small_config(tokenizer, recipe.max_tokens, **_one_label(label)))
    return _classifier(model, tokenizer, recipe)


def _from_base(base: str, recipe: Recipe, label: str) -> Classifier:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=torch.float32,
            trust_remote_code=False,
            # A classifier of other labels gets a new head; that it is new is what training is for.
            ignore_mismatched_sizes=True,
            **_one_label(label),
        )
    except Exception as error:
        raise TrainingDataError(f"the base {base} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None:
        raise TrainingDataError(f"the tokenizer of the base {base} has neither a padding token nor an EOS")
    return _classifier(model, tokenizer, recipe)


def _one_label(label: str) -> dict[str, Any]:
    return {"num_labels": 1, "id2label": {0: label}, "label2id": {label: 0}, "problem_type": "regression"}


def _classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Classifier:
    tokenizer.truncation_side = "left"
    try:
        torch.nn.Module.to(model, place(recipe.device))
    except (RewardLoadError, RuntimeError) as error:
        raise TrainingDataError(str(error)) from error
    classifier = Classifier(model, tokenizer)
    if classifier.max_tokens is not None and recipe.max_tokens > classifier.max_tokens:
        raise TrainingDataError(f"the base reads {classifier.max_tokens} tokens at most; give a lower max_tokens")
    return classifier


def _rows(classifier: Classifier, rated: Sequence[Rated], recipe: Recipe) -> list[Row]:
    rows = classifier.encode([each.text for each in rated], most=recipe.max_tokens)
    for row, each in zip(rows, rated, strict=True):
        if not row.ids:
            raise TrainingDataError(f"the text {each.text!r} has no tokens")
    return rows


def _fit(classifier: Classifier, rows: Sequence[Row], targets: Any, recipe: Recipe, pace: Pace) -> None:
    epochs = recipe.epochs or pace.epochs
    peak = recipe.learning_rate or pace.learning_rate
    model = classifier.model.train()
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=peak, betas=(0.9, 0.98))
    shuffle = random.Random(recipe.seed)
    steps, step = epochs * math.ceil(len(rows) / recipe.batch_size), 0
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in _batches(rows, recipe.batch_size, shuffle):
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(step, steps)
            inputs = classifier.inputs([rows[index] for index in batch])
            if pace.masked:
                _hide(inputs["input_ids"], classifier.tokenizer, pace.masked)
            target = torch.tensor(targets[batch], dtype=torch.float32, device=model.device)
            loss = F.mse_loss(model(**inputs).logits[:, 0], target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
            step += 1
        _log.info("trained", epoch=f"{epoch} of {epochs}", loss=round(total / len(rows), 4))
        if not math.isfinite(total):
            raise TrainingDataError("the loss is not finite any more: give a lower learning_rate")
    model.eval()


def _parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
    ]


def _schedule(step: int, steps: int) -> float:
    """The fraction of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(rows: Sequence[Row], size: int, shuffle: random.Random) -> Iterator[list[int]]:
    """Indices of every row once, in batches of rows of like length out of a random sixteenfold."""
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    many = 16 * size
    sorted_parts = [
        sorted(order[first : first + many], key=lambda index: len(rows[index].ids))
        for first in range(0, len(order), many)
    ]
    batches = [part[first : first + size] for part in sorted_parts for first in range(0, len(part), size)]
    shuffle.shuffle(batches)
    yield from batches


def _hide(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, share: float) -> None:
    """Put the mask token in the place of a random `share` of the tokens that are not special, in `ids` itself."""
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & ~torch.isin(ids, special)
    ids[hidden] = int(tokenizer.mask_token_id)


def _predict(classifier: Classifier, rows: Sequence[Row]) -> Any:
    return classifier.logits(rows, _SCORING_TOKENS)[:, 0].numpy()


def _save(classifier: Classifier, report: Report, output: Path) -> None:
    """Complete or absent: a training that was stopped while saving leaves no half of a model."""
    with _folder_beside(output) as folder:
        made = Path(folder) / "model"
        classifier.model.save_pretrained(made)
        classifier.tokenizer.save_pretrained(made)
        (made / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
        if output.exists():
            output.rmdir()
        made.rename(output)
