"""A sequence classifier of transformers: loaded, checked, and run over rows of tokens."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reward_server.kinds import RewardLoadError
from reward_server.kinds.batching import Row, micro_batches, pad
from rlhf.fingerprints import tokenizer_digest, weights_digest
from rlhf.logs import get_logger

_log = get_logger(__name__)

# How far a logit may move by rounding alone when a text has company.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class AbandonedError(Exception):
    """Nobody waits for the scores any more."""


class Classifier:
    """A model in evaluation mode with its tokenizer. A text's logits do not depend on what is scored beside it.

    max_tokens: the longest text that the model can read; None = it states no limit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        model.eval()  # type: ignore[no-untyped-call]
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = _longest(model, tokenizer)
        self._takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self._config = model.config.get_text_config()
        self._pad_id: int | None = self._config.pad_token_id
        # No second forward needs what a decoder keeps for it.
        self._config.use_cache = False
        self._padding = self._bears_padding()

    @property
    def labels(self) -> dict[int, str]:
        """Names of the logits."""
        return {int(index): str(name) for index, name in (self.model.config.id2label or {}).items()}

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        special_tokens: bool = True,
        most: int | None = None,
    ) -> list[Row]:
        """Token ids; the tokenizer adds its special tokens unless the text has them already.

        most: what is longer is cut to so many tokens, on the tokenizer's `truncation_side`, of a pair the longer text.
        """
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            add_special_tokens=special_tokens,
            truncation=most is not None,
            max_length=most,
            # Too long is for the caller to say.
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        segments = encoded.get("token_type_ids") if self._takes_segments else None
        return [Row(row, segments[index] if segments else ()) for index, row in enumerate(ids)]

    def logits(self, rows: Sequence[Row], batch_tokens: int, abandoned: threading.Event | None = None) -> Tensor:
        """[rows, labels] in double precision on the CPU. Raises AbandonedError between two forwards."""
        found = torch.empty(len(rows), len(self.labels), dtype=torch.float64)
        for batch in micro_batches([len(row.ids) for row in rows], batch_tokens, padding=self._padding):
            if abandoned is not None and abandoned.is_set():
                raise AbandonedError
            found[batch] = self._forward([rows[index] for index in batch])
        return found

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the model's forward takes for rows that go together, on its device."""
        filler = self._pad_id if self._pad_id is not None else _ends_none_of(rows)
        # A decoder judges at the last token that is not this one, and refuses to pad while it is None.
        self._config.pad_token_id = filler
        padded = pad(rows, filler)
        inputs = {"input_ids": padded.ids, "attention_mask": padded.mask}
        if padded.segments:
            inputs["token_type_ids"] = padded.segments
        return {name: torch.tensor(value, device=self.model.device) for name, value in inputs.items()}

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row]) -> Tensor:
        logits: Tensor = self.model(**self.inputs(rows)).logits
        return logits.to("cpu", torch.float64)

    def _bears_padding(self) -> bool:
        """Whether a short text's logits stay what they are beside a long one; where not, only equal lengths meet."""
        short, long = self.encode(["a", "a " * 12])
        if not short.ids or len(short.ids) == len(long.ids):
            return True
        alone, beside = self._forward([short])[0], self._forward([short, long])[0]
        moved = (alone - beside).abs().max().item()
        bears = moved <= _ROUNDING[self.model.dtype] * max(1.0, alone.abs().max().item())
        if not bears:
            _log.warning("this model's scores move with padding; only texts of one length are scored together")
        return bears

    def described(self) -> dict[str, Any]:
        """All that the logits depend on: weights as loaded, configuration, tokenizer, transformers' code."""
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "use_cache", "pad_token_id"):
            config.pop(name, None)
        return {
            "weights": weights_digest(self.model.state_dict().items(), self.model.dtype),
            "config": config,
            "pad_id": self._pad_id,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "inputs": self.tokenizer.model_input_names,
            "transformers": transformers.__version__,
        }


def _ends_none_of(rows: Sequence[Row]) -> int:
    """A token id that no row ends with: there are more ids than rows."""
    last = {row.ids[-1] for row in rows}
    return next(token for token in range(len(rows) + 1) if token not in last)


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The least of what the tokenizer and the positions of the model allow."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from after the padding's.
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings"):
            positions = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limits = [positions] if isinstance(positions, int) and positions > 0 else []
    # A tokenizer without a limit says 10^30.
    if tokenizer.model_max_length < 1 << 40:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)


def load_classifier(source: str, *, revision: str | None, device: str, dtype: torch.dtype) -> Classifier:
    """The model and tokenizer of a folder or hub name. Raises RewardLoadError, saying what to do."""
    where = place(device)
    is_folder = Path(source).is_dir()
    if is_folder and revision is not None:
        raise RewardLoadError(f"revision is for models of the hub, and {source} is a folder")
    if not is_folder:
        _require_hub_name(source)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise RewardLoadError(_because(source, "tokenizer", is_folder, error)) from error
    # What transformers makes of files that are not there.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise RewardLoadError(f"the tokenizer of {source} has no vocabulary: its files are missing")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:
        raise RewardLoadError(_because(source, "classifier", is_folder, error)) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise RewardLoadError(
            f"{source} is not a trained classifier: its files lack {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}, which would be random. "
            "Give a model that was saved as one for sequence classification"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RewardLoadError(f"the tokenizer of {source} has {len(tokenizer)} tokens, its model only {rows}")
    try:
        model.to(where)
    except RuntimeError as error:
        raise RewardLoadError(f"{source} cannot be moved to {where}: {error}") from error
    return Classifier(model, tokenizer)


def place(device: str) -> torch.device:
    """The device of that name; auto = a GPU where there is one. Raises RewardLoadError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise RewardLoadError(f"{device!r} is no device: auto, cpu, cuda, cuda:1 …") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise RewardLoadError(f"there is no {device} here; device=auto takes what there is")
    return where


def _require_hub_name(source: str) -> None:
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise RewardLoadError(f"there is no folder {source}") from error


def _because(source: str, what: str, is_folder: bool, error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    if is_folder:
        return f"the {what} in {source} cannot be loaded: {reason}"
    return f"there is no folder {source}, and the {what} of that name cannot be had from the hub: {reason}"
