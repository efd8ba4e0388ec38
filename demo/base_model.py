"""The model that PPO starts from: a byte-level BPE tokenizer and a small GPT-2, trained on the reviews once and cached.

The same recipe on the same machine gives the same weights; another recipe gets another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from demo.data import Split
from trainer.tokenizers import save_tokenizer

EOS = "<|endoftext|>"
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """All that decides which model comes out. batch_tokens: tokens of one optimizer step, about."""

    vocabulary: int = 2048
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    epochs: int = 5
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    seed: int = 0

    @property
    def digest(self) -> str:
        """Names the cache folder."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TrainingReport:
    """What the training took and reached; losses in nats per token."""

    seconds: float
    parameters: int
    train_loss: float
    held_out_loss: float


def base_model(cache: Path, split: Split, recipe: Recipe, console: Console) -> Path:
    """The folder of the trained model and tokenizer below `cache`, made there unless it is already."""
    folder = cache / f"base-model-{recipe.digest}"
    if (folder / "config.json").is_file():
        console.print(f"Base model: {folder} (cached)")
        return folder
    console.print("Training the base model on the reviews, once; it is cached afterwards.")
    # Its hints are for other uses of a model than this loop, and its bars would break ours.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    train, held_out = [review.text for review in split.train], [review.text for review in split.held_out]
    tokenizer = train_tokenizer(train, recipe.vocabulary)
    model, report = train_model(tokenizer, train, held_out, recipe, console)
    console.print(
        f"Base model: {report.parameters / 1e6:.1f} M parameters in {report.seconds:.0f} s, "
        f"loss {report.train_loss:.2f} nats per token, held out {report.held_out_loss:.2f}"
    )
    partial = cache / f".base-model-{os.getpid()}"
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    (partial / "recipe.json").write_text(
        json.dumps({**dataclasses.asdict(recipe), **dataclasses.asdict(report)}, indent=2) + "\n"
    )
    # Complete or absent: a run that was interrupted while saving must not leave half a model behind.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` tokens, the last of the special ones being EOS (and padding)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token=EOS, bos_token=EOS, pad_token=EOS
    )


def train_model(
    tokenizer: PreTrainedTokenizerFast, train: Sequence[str], held_out: Sequence[str], recipe: Recipe, console: Console
) -> tuple[GPT2LMHeadModel, TrainingReport]:
    """A GPT-2 trained on `train`, each text a sequence of its own that ends with EOS.

    Rows begin where reviews begin, as prompts do, so positions mean the same in training and in generation.
    """
    torch.manual_seed(recipe.seed)
    shuffle = random.Random(recipe.seed)
    rows = _rows(tokenizer, train, recipe.context)

    model = GPT2LMHeadModel(_model_config(tokenizer, recipe))
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), betas=(0.9, 0.98))
    steps = recipe.epochs * sum(1 for _ in _batches(rows, recipe.batch_tokens, random.Random(0)))
    began = time.monotonic()
    loss_average = float("nan")
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps, loss=loss_average)
        step = 0
        for _ in range(recipe.epochs):
            for batch in _batches(rows, recipe.batch_tokens, shuffle):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * _schedule(step, steps, recipe.warmup_steps)
                loss = _loss(model, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                loss_average = loss.item() if step == 1 else 0.98 * loss_average + 0.02 * loss.item()
                progress.update(task, completed=min(step, steps), loss=loss_average)
    seconds = time.monotonic() - began
    model.eval()  # type: ignore[no-untyped-call]
    return model, TrainingReport(
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_loss=loss_average,
        held_out_loss=_mean_loss(model, _rows(tokenizer, held_out, recipe.context), recipe.batch_tokens),
    )


def _rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int) -> list[list[int]]:
    """Token ids of each text, cut to the context, EOS at the end."""
    return [[*ids[: context - 1], tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]


def _model_config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        # The same function as gelu_new, as one operation instead of eight.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        # PPO compares log-probabilities across forwards, so nothing in the model may be random.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
    )


def _parameter_groups(model: GPT2LMHeadModel, weight_decay: float) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _schedule(step: int, steps: int, warmup: int) -> float:
    """The fraction of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _batches(rows: Sequence[list[int]], batch_tokens: int, shuffle: random.Random) -> Iterator[list[list[int]]]:
    """Every row once, in batches of rows of like length, so that hardly anything is padding."""
    order = sorted(rows, key=lambda row: (len(row), shuffle.random()))
    batches: list[list[list[int]]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(row) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    shuffle.shuffle(batches)
    yield from batches


def _loss(model: GPT2LMHeadModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """Mean cross-entropy of the tokens after the first of each row."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [_IGNORED] * (width - len(row)) for row in rows])
    # Padding is on the right, where causal attention never looks: no mask is needed.
    logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


@torch.no_grad()
def _mean_loss(model: GPT2LMHeadModel, rows: Sequence[list[int]], batch_tokens: int) -> float:
    total, count = 0.0, 0
    for batch in _batches(rows, batch_tokens, random.Random(0)):
        tokens = sum(len(row) - 1 for row in batch)
        total += _loss(model, batch).item() * tokens
        count += tokens
    return total / max(1, count)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(),
        console=console,
    )
