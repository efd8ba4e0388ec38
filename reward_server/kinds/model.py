"""The model kind: a sequence classifier of transformers judges the text, as reward models do."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from reward_server.kinds import Description, Limits, RewardKind, RewardLoadError, Sample
from reward_server.kinds.batching import Row
from reward_server.kinds.classifier import load_classifier
from reward_server.results import Failed, FailureCode, Outcome, Scored
from reward_server.workers import WorkerThreads
from rlhf import __version__, failures
from rlhf.logs import get_logger

_log = get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelOptions(BaseModel):
    """Which model, what it reads, and which of its numbers is the reward."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="Folder or hub name of a sequence classifier with its tokenizer")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub name; unset: its main branch"
    )
    label: int | str | None = Field(
        default=None, description="Index or name of the label that is scored; unset: the only one"
    )
    score: Literal["logit", "sigmoid", "softmax"] = Field(
        default="logit", description="The label's logit, its own probability, or its probability among the labels"
    )
    scale: float = Field(default=1.0, description="The reward is score × scale + shift")
    shift: float = Field(default=0.0, description="The reward is score × scale + shift")
    text: Literal["completion", "both", "pair", "chat"] = Field(
        default="completion",
        description="What is read: the completion, prompt and completion as one text, as two segments, or as a chat",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest text; unset: what the model reads, at most batch_tokens [tokens]"
    )
    truncate: Literal["left", "right", "fail"] = Field(
        default="left", description="The side on which a longer text loses tokens, or that its sample fails"
    )
    batch_tokens: int = Field(default=8192, ge=1, description="Most tokens in one forward, padding included [tokens]")
    device: str = Field(default="auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1 …")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Type of the weights")

    @model_validator(mode="after")
    def _check_batch(self) -> ModelOptions:
        if self.max_tokens is not None and self.max_tokens > self.batch_tokens:
            raise ValueError(f"max_tokens ({self.max_tokens}) is more than batch_tokens ({self.batch_tokens})")
        return self


class ModelReward(RewardKind):
    """Scores with one model in one worker thread; a call that nobody waits for ends before its next forward."""

    kind = "model"
    concurrency = 1

    def __init__(self, options: ModelOptions, limits: Limits) -> None:
        self.batch_size = limits.batch_size
        self._options = options
        self._worker = WorkerThreads(1, name="model")

    async def start(self) -> None:
        """Load and check the model. Raises RewardLoadError."""
        await self._worker.run(self._load)

    def _load(self) -> None:
        options = self._options
        self._classifier = load_classifier(
            options.model, revision=options.revision, device=options.device, dtype=_DTYPES[options.dtype]
        )
        tokenizer = self._classifier.tokenizer
        self._label = _label(options, self._classifier.labels)
        self._max_tokens = _max_tokens(options, self._classifier.max_tokens, self._frame())
        if options.text == "chat" and not tokenizer.chat_template:
            raise RewardLoadError(f"text=chat needs a chat template, and the tokenizer of {options.model} has none")
        if options.truncate != "fail":
            tokenizer.truncation_side = options.truncate
        self.description = Description(name=_name(options.model), version=f"model@{self._digest()}")
        _log.info(
            "loaded a reward model",
            model=options.model,
            label=self._classifier.labels[self._label],
            device=str(self._classifier.model.device),
            max_tokens=self._max_tokens,
        )

    def _frame(self) -> int:
        """How many tokens the tokenizer puts around a text."""
        if self._options.text == "chat":
            return 0
        return self._classifier.tokenizer.num_special_tokens_to_add(pair=self._options.text == "pair")

    def _digest(self) -> str:
        # How the numbers are computed is left out, and so is where the files lie: the classifier tells what is in them.
        options = self._options.model_dump(exclude={"model", "revision", "device", "batch_tokens"})
        described = [
            __version__,
            {**options, "label": self._label, "max_tokens": self._max_tokens},
            self._classifier.described(),
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """One outcome per sample. Raises unavailable when the device has no memory left for a batch."""
        abandoned = threading.Event()
        try:
            return await self._worker.run(partial(self._judge, samples, abandoned))
        except torch.OutOfMemoryError as error:
            raise failures.unavailable(
                f"the reward model's device is out of memory; batch_tokens={self._options.batch_tokens} may be too many"
            ) from error
        finally:
            abandoned.set()

    def _judge(self, samples: Sequence[Sample], abandoned: threading.Event) -> list[Outcome]:
        encoded = self._encode(samples)
        rows = [row for row in encoded if isinstance(row, Row)]
        scored = iter(self._scored(rows, self._classifier.logits(rows, self._options.batch_tokens, abandoned)))
        return [next(scored) if isinstance(row, Row) else row for row in encoded]

    def _encode(self, samples: Sequence[Sample]) -> list[Row | Failed]:
        texts = [self._text(sample) for sample in samples]
        readable = [text for text in texts if isinstance(text, tuple)]
        rows = iter(self._rows(readable))
        return [text if isinstance(text, Failed) else self._checked(next(rows), text) for text in texts]

    def _text(self, sample: Sample) -> tuple[str, ...] | Failed:
        """What the model reads of a sample: one text, or two for a pair."""
        match self._options.text:
            case "completion":
                return (sample.completion,)
            case "both":
                return (sample.prompt + sample.completion,)
            case "pair":
                return (sample.prompt, sample.completion)
            case "chat":
                return self._chat(sample)

    def _chat(self, sample: Sample) -> tuple[str, ...] | Failed:
        turns = [dict(turn) for turn in sample.messages] or [
            {"role": "user", "content": sample.prompt},
            {"role": "assistant", "content": sample.completion},
        ]
        try:
            return (str(self._classifier.tokenizer.apply_chat_template(turns, tokenize=False)),)
        # A template is a program of the model's: it may refuse a conversation in any way.
        except Exception as error:
            return Failed(FailureCode.CHAT_TEMPLATE, f"the chat template refuses the conversation: {error}")

    def _rows(self, texts: Sequence[tuple[str, ...]], most: int | None = None) -> list[Row]:
        if not texts:
            return []
        first, *second = (list(column) for column in zip(*texts, strict=True))
        return self._classifier.encode(
            first,
            second[0] if second else None,
            # A chat template has written them already.
            special_tokens=self._options.text != "chat",
            most=most,
        )

    def _checked(self, row: Row, text: tuple[str, ...]) -> Row | Failed:
        if not row.ids:
            return Failed(FailureCode.EMPTY_TEXT, "there is no token to judge: the text is empty")
        if len(row.ids) <= self._max_tokens:
            return row
        if self._options.truncate == "fail":
            return Failed(FailureCode.TEXT_TOO_LONG, f"{len(row.ids)} tokens, and max_tokens is {self._max_tokens}")
        (cut,) = self._rows([text], self._max_tokens)
        return Row(cut.ids, cut.segments, truncated=True)

    def _scored(self, rows: Sequence[Row], logits: Tensor) -> list[Outcome]:
        chosen = logits[:, self._label]
        components = {"logit": chosen}
        if self._options.score != "logit":
            components["probability"] = (
                chosen.sigmoid() if self._options.score == "sigmoid" else logits.softmax(dim=1)[:, self._label]
            )
        rewards = list(components.values())[-1] * self._options.scale + self._options.shift
        return [
            _outcome(
                reward,
                {name: values[index].item() for name, values in components.items()}
                | {"truncated": float(row.truncated)},
            )
            for index, (row, reward) in enumerate(zip(rows, rewards.tolist(), strict=True))
        ]


def _outcome(reward: float, components: dict[str, float]) -> Outcome:
    if not all(math.isfinite(number) for number in (reward, *components.values())):
        return Failed(FailureCode.NOT_FINITE, f"the model's logit is {components['logit']}, the reward {reward}")
    return Scored(reward, components)


def _label(options: ModelOptions, labels: dict[int, str]) -> int:
    """Index of the label that is scored. Raises RewardLoadError, with the labels that there are."""
    if options.score == "softmax" and len(labels) == 1:
        raise RewardLoadError(
            f"score=softmax is always 1 for {options.model}, which has one label: use sigmoid or logit"
        )
    if options.label is None and len(labels) == 1:
        return 0
    for index, name in labels.items():
        if options.label in (index, name):
            return index
    wanted = "needs a label" if options.label is None else f"has no label {options.label!r}"
    known = ", ".join(f"{index} ({name})" for index, name in sorted(labels.items()))
    raise RewardLoadError(f"{options.model} {wanted}; label is one of {known}")


def _max_tokens(options: ModelOptions, readable: int | None, frame: int) -> int:
    """The longest text, with the `frame` tokens around it. Raises RewardLoadError where the model cannot read that."""
    max_tokens = options.max_tokens or min(options.batch_tokens, readable or options.batch_tokens)
    if readable is not None and max_tokens > readable:
        raise RewardLoadError(f"max_tokens is {max_tokens}, and {options.model} reads {readable} at most")
    if max_tokens <= frame:
        raise RewardLoadError(
            f"the tokenizer of {options.model} needs {frame} tokens for its own marks, which leaves nothing of a text "
            f"that is cut to {max_tokens}: raise max_tokens or batch_tokens"
        )
    return max_tokens


def _name(model: str) -> str:
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
