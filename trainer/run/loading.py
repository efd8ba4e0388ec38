"""What the trainer loads before it talks to anyone: the policy, its tokenizer, a reference of its own, the prompts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.accelerator import Accelerator
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_scheduler

from rlhf.fingerprints import tokenizer_digest, weights_digest
from rlhf.logs import get_logger
from rlhf.memory import keep_freed_memory
from trainer.adapters import (
    ADAPTER_OFF,
    AdapterOff,
    adapted_layers,
    adapter_of,
    add_adapter,
    base_parameters,
    layers_of_adapter,
    lora_config,
    names_adapter,
)
from trainer.learning.learner import PPOLearner
from trainer.learning.ranks import Ranks
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.importance import IMPORTANCE_CAP
from trainer.run.checkpoints import realign_parameters
from trainer.run.prompts import Prompt, Record, encode, load_records
from trainer.run.seeds import derive_seed
from trainer.settings import LrScheduler, ReferencePlace, Sharding, TrainerSettings

_log = get_logger(__name__)


class SettingsError(ValueError):
    """Settings that don't fit the model or the data; the message says what to change."""


@dataclass(frozen=True)
class LoadedModel:
    """The policy being trained and what goes with it."""

    model: AutoModelForCausalLMWithValueHead
    tokenizer: Any
    tokenizer_digest: str
    reference: PreTrainedModel | AdapterOff | None
    reference_digest: str
    """Of `reference`; empty if there is none."""
    base_digest: str
    """Of the model under the adapter; empty if there is no adapter."""
    max_prompt_tokens: int

    @property
    def pad_id(self) -> int:
        """Fills padding, which is masked everywhere: any id will do."""
        return self.tokenizer.pad_token_id or 0

    @property
    def logit_columns(self) -> int:
        """Width of the policy's logits, padding included."""
        return _logit_columns(self.model.pretrained_model)


@dataclass(frozen=True)
class LoadedData:
    """The rows to train on, and those to evaluate on."""

    training: Sequence[Record]
    held_out: Sequence[Record]


def prepare_torch(settings: TrainerSettings) -> None:
    """Set threads, memory, determinism and the seed, before anything is loaded."""
    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.reproducible:
        # cuBLAS reads it when CUDA starts; without it, torch refuses the first matrix product there.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # A fresh value head draws its weights here.
    torch.manual_seed(derive_seed(settings.seed, "model"))


def load_model(settings: TrainerSettings, checkpoint: Path | None) -> LoadedModel:
    """Load from the checkpoint, or at a run's beginning from what --model names; a fresh value head uses torch's seed.

    Raises SettingsError.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = str(checkpoint or settings.model)
    with _loading(source, "--model"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = _load_policy(settings, checkpoint)
    realign_parameters(model)
    base_digest = ""
    if model.is_peft_model:
        base_digest = weights_digest(base_parameters(model.pretrained_model), torch.float32)
    reference: PreTrainedModel | AdapterOff | None = None
    reference_digest = ""
    if settings.reference is ReferencePlace.TRAINER:
        if model.is_peft_model and settings.reference_model in (None, settings.model):
            reference, reference_digest = ADAPTER_OFF, base_digest
        else:
            reference = _load_reference(settings.reference_model or settings.model)
            reference_digest = weights_digest(reference.named_parameters(), torch.float32)
            if (theirs := _logit_columns(reference)) != (ours := _logit_columns(model.pretrained_model)):
                raise SettingsError(
                    f"the reference has {theirs} logit columns, --model {ours}: give a --reference-model of the same "
                    "vocabulary"
                )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        reference=reference,
        reference_digest=reference_digest,
        base_digest=base_digest,
        max_prompt_tokens=_max_prompt_tokens(settings, _context_tokens(model)),
    )


def load_data(settings: TrainerSettings) -> LoadedData:
    """Training records and held-out ones, which are the same rows at every start of the run.

    Raises PromptDataError.
    """
    records = load_records(settings.data, column=settings.prompt_column, split=settings.data_split)
    if settings.eval_prompts == 0:
        return LoadedData(records, [])
    if settings.eval_data is not None:
        others = load_records(settings.eval_data, column=settings.prompt_column, split=settings.eval_split)
        return LoadedData(records, others[: settings.eval_prompts])
    most = min(settings.eval_prompts, len(records) // 5)
    return LoadedData(*split_off_held_out(records, most=most, seed=settings.seed))


def usable_prompts(records: Sequence[Record], loaded: LoadedModel) -> list[Prompt]:
    """Held-out records ready for a rollout; those that are empty or too long are left out with a warning."""
    prompts = [encode(record, loaded.tokenizer) for record in records]
    usable = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= loaded.max_prompt_tokens]
    if len(usable) < len(prompts):
        _log.warning("held-out prompts that are empty or too long are left out", count=len(prompts) - len(usable))
    return usable


def new_learner(
    settings: TrainerSettings,
    model: AutoModelForCausalLMWithValueHead,
    reference: PreTrainedModel | AdapterOff | None,
    *,
    pad_id: int,
    ranks: Ranks,
) -> PPOLearner:
    """A learner that has trained nothing yet; raises SettingsError for what the model can't do."""
    # As `join_ranks` has it: accelerate keeps one state for the whole process.
    cpu = ranks.count > 1 and not torch.accelerator.is_available()

    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return lr_schedule(settings, optimizer)

    try:
        return PPOLearner(
            model,
            settings.ppo_config(),
            reference=reference,
            tokenizer_pad_id=pad_id,
            temperature=settings.temperature,
            old_logprobs=settings.old_logprobs.value,
            importance_cap=IMPORTANCE_CAP if settings.max_staleness > 0 and settings.importance_sampling else None,
            accelerator=Accelerator(mixed_precision=settings.mixed_precision.value, cpu=cpu),
            lr_scheduler=schedule,
            ranks=ranks,
            sharded=settings.sharding is Sharding.FSDP,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


def lr_schedule(settings: TrainerSettings, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """transformers' schedule of that name, counted in PPO steps."""
    warmup, name = settings.lr_warmup_steps, settings.lr_scheduler
    # What transformers calls constant has no warm-up.
    called = "constant_with_warmup" if name is LrScheduler.CONSTANT else name.value
    schedule: LRScheduler = get_scheduler(called, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    return schedule


def split_off_held_out(records: Sequence[Record], *, most: int, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Records to train on, and up to `most` others to evaluate on; no prompt is in both, however often it is repeated.

    A function of the records and the seed alone.
    """
    repeated: dict[str, list[Record]] = {}
    for record in records:
        repeated.setdefault(json.dumps(record.prompt, default=str), []).append(record)
    held_out: list[Record] = []
    for group in sorted(repeated.values(), key=lambda group: derive_seed(seed, "held out", group[0].row)):
        if len(held_out) + len(group) <= most:
            held_out += group
    rows = {record.row for record in held_out}
    if most and not held_out:
        _log.warning("the data repeats its prompts so often that none can be held out; give --eval-data")
    return [record for record in records if record.row not in rows], held_out


@contextlib.contextmanager
def _loading(source: str, setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"can't load {source} ({setting}): {error}") from error


def _load_policy(settings: TrainerSettings, checkpoint: Path | None) -> AutoModelForCausalLMWithValueHead:
    """The policy with its value head, and with the adapter that the settings ask for: fresh, or the checkpoint's."""
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    has_adapter = checkpoint is not None and names_adapter(str(checkpoint), {}) is not None
    if has_adapter and settings.lora_rank is None:
        raise SettingsError(f"{checkpoint} holds a LoRA adapter: give the --lora-rank that this run began with")
    if has_adapter:
        with _loading(str(checkpoint), "--model"):
            model = load(str(checkpoint), base_model=settings.model, trust_remote_code=False)
        _require_same_adapter(settings, model.pretrained_model)
        return model
    if checkpoint is not None and settings.lora_rank is not None:
        raise SettingsError(
            f"--lora-rank is {settings.lora_rank}, but this run trains all weights: leave it out, or begin a new run"
        )
    source = str(checkpoint or settings.model)
    with _loading(source, "--model"):
        if base := names_adapter(source, {}):
            raise ValueError(f"it is an adapter of {base}, which policy servers do not load; give a whole model")
        model = load(source, trust_remote_code=False)
    if settings.lora_rank is not None:
        config = lora_config(settings.lora_rank, _lora_alpha(settings), settings.lora_targets)
        try:
            add_adapter(model.pretrained_model, config)
        except ValueError as error:
            raise SettingsError(f"--lora-targets: {error}") from error
    return model


def _lora_alpha(settings: TrainerSettings) -> float:
    assert settings.lora_rank is not None, "there is an adapter"
    return 2.0 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha


def _require_same_adapter(settings: TrainerSettings, model: PreTrainedModel) -> None:
    config, layers = adapter_of(model), layers_of_adapter(model)
    assert config is not None, "it was loaded"
    try:
        asked = adapted_layers(model, settings.lora_targets)
    except ValueError as error:
        raise SettingsError(f"--lora-targets: {error}") from error
    if (settings.lora_rank, _lora_alpha(settings), asked) != (config.r, config.lora_alpha, layers):
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        raise SettingsError(
            f"this run began with --lora-rank {config.r}, --lora-alpha {config.lora_alpha:g} and an adapter in "
            f"{len(layers)} layers ({', '.join(names)}); the settings ask for another: give those, or begin a new run"
        )


def _load_reference(source: str) -> PreTrainedModel:
    with _loading(source, "--reference-model"):
        reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False
        )
    realign_parameters(reference)
    return reference


def _logit_columns(model: PreTrainedModel) -> int:
    columns: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]
    return columns


def _context_tokens(model: AutoModelForCausalLMWithValueHead) -> int | None:
    tokens = getattr(model.pretrained_model.config, "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) else None


def _max_prompt_tokens(settings: TrainerSettings, context: int | None) -> int:
    if context is None:
        if settings.max_prompt_tokens is None:
            raise SettingsError("the model states no context length: give --max-prompt-tokens")
        return settings.max_prompt_tokens
    room = context - settings.max_new_tokens
    if room < 1:
        raise SettingsError(
            f"max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt, as the model's context is "
            f"{context}: lower --max-new-tokens"
        )
    if settings.max_prompt_tokens is None:
        return room
    if settings.max_prompt_tokens > room:
        raise SettingsError(
            f"max_prompt_tokens ({settings.max_prompt_tokens}) + max_new_tokens ({settings.max_new_tokens}) is more "
            f"than the model's context of {context}: lower one of them"
        )
    return settings.max_prompt_tokens
