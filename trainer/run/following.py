"""Ranks above 0: they build the model that rank 0 describes, and do with it what rank 0 does."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlhf.logs import bound_context, get_logger
from trainer.adapters import AdapterOff, adapter_of, add_adapter
from trainer.learning.control import END, lost_ranks_named
from trainer.learning.learner import NonFiniteLossError, PPOLearner
from trainer.learning.ranks import Ranks
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.run.loading import LoadedModel, new_learner, prepare_torch
from trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from peft import LoraConfig

_log = get_logger(__name__)

_BUILD = "build"


@dataclass(frozen=True)
class Blueprint:
    """A loaded model without its weights: all that another rank needs, which therefore reads no file."""

    config: PreTrainedConfig
    dtype: torch.dtype
    adapter: LoraConfig | None
    reference: PreTrainedConfig | AdapterOff | None
    pad_id: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> Blueprint:
        """That of a model which rank 0 has loaded."""
        model = loaded.model.pretrained_model
        reference = loaded.reference.config if isinstance(loaded.reference, PreTrainedModel) else loaded.reference
        return cls(model.config, model.dtype, adapter_of(model), reference, loaded.pad_id)

    def build(self) -> tuple[AutoModelForCausalLMWithValueHead, PreTrainedModel | AdapterOff | None]:
        """Policy with value head, and reference, on the meta device."""
        with torch.device("meta"):
            language_model = _empty(self.config, self.dtype)
            if self.adapter is not None:
                add_adapter(language_model, self.adapter)
            model = AutoModelForCausalLMWithValueHead(language_model)
            of = self.reference
            reference = _empty(of, torch.float32) if isinstance(of, PreTrainedConfig) else of
        return model.eval(), reference


def leading_learner(settings: TrainerSettings, loaded: LoadedModel, ranks: Ranks) -> PPOLearner:
    """Rank 0's learner, made together with everyone else's. Raises SettingsError."""
    with ranks.together(_BUILD, Blueprint.of(loaded)):
        return new_learner(settings, loaded.model, loaded.reference, pad_id=loaded.pad_id, ranks=ranks)


def follow(settings: TrainerSettings, ranks: Ranks) -> int:
    """Do what rank 0 does until it says to end; returns the exit code, which is rank 0's.

    Raises RanksLostError when rank 0 is gone.
    """
    # A launcher signals every process. Rank 0 alone decides: its checkpoint may need all of them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    prepare_torch(settings)
    learner: PPOLearner | None = None
    with bound_context(rank=ranks.index):
        while True:
            command, arguments = ranks.hear()
            if command == END:
                code: int = arguments[0]
                return code
            try:
                with lost_ranks_named():
                    if command == _BUILD:
                        blueprint: Blueprint = arguments[0]
                        model, reference = blueprint.build()
                        learner = new_learner(settings, model, reference, pad_id=blueprint.pad_id, ranks=ranks)
                    else:
                        getattr(learner, command)(*arguments)
            except (ValueError, NonFiniteLossError) as error:
                # Bad input and bad numbers are the same on every rank, and rank 0 says what becomes of them.
                _log.warning(f"{command} failed here, as it should have on every rank: {error}")


def _empty(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model
