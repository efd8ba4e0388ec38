"""Which processes train together: what the launcher asked for, held against what is in effect."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate.accelerator import Accelerator

from trainer.learning.control import Control, RanksLostError
from trainer.learning.ranks import ALONE, Ranks
from trainer.run.loading import SettingsError
from trainer.settings import MixedPrecision, Sharding, TrainerSettings

_ASKED_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "leave --use_fsdp out and give the trainer --sharding fsdp",
    "ACCELERATE_USE_DEEPSPEED": "leave --use_deepspeed out; --sharding fsdp parts weights, gradients and moments",
    "ACCELERATE_USE_MEGATRON_LM": "leave --use_megatron_lm out; --sharding fsdp parts weights, gradients and moments",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "leave --use_parallelism_config out; --sharding fsdp parts the model",
}


def join_ranks(settings: TrainerSettings) -> Ranks:
    """Connect with the processes that the launcher started beside this one; rank 0 leads them.

    Raises SettingsError when what was asked for, here or of the launcher, is not what is in effect, RanksLostError when
    the others did not come in time.
    """
    for variable, instead in _ASKED_OF_ACCELERATE.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise SettingsError(f"{variable} is set, but the trainer would not follow it: {instead}")
    precision = settings.mixed_precision.value
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in (MixedPrecision.NO.value, precision):
        raise SettingsError(f"the launcher asks for mixed precision {asked}, --mixed-precision is {precision}: say one")
    if (asked := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise SettingsError(f"the launcher asks for torch.compile by {asked}: leave --dynamo_backend out")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    count = 1
    if world > 1:
        # Without `cpu` accelerate would let every process train for itself where there is no accelerator.
        try:
            count = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available()).num_processes
        except dist.DistError as error:
            raise RanksLostError(f"WORLD_SIZE is {world}, but the processes did not come together: {error}") from error
        except (ValueError, RuntimeError) as error:
            raise SettingsError(
                f"WORLD_SIZE is {world}, but the processes can't connect ({error}): start all of them by accelerate "
                "launch or torchrun"
            ) from error
        connected = dist.get_world_size() if dist.is_initialized() else 1
        if not count == connected == world:
            raise SettingsError(
                f"WORLD_SIZE is {world}, but accelerate has {count} processes and torch.distributed {connected}: start "
                "all of them by accelerate launch or torchrun"
            )
    if settings.processes not in (None, count):
        raise SettingsError(
            f"--processes is {settings.processes}, but {count} train together: accelerate launch --num_processes and "
            "torchrun --nproc-per-node start more (accelerate launch --cpu starts one, however many are asked for)"
        )
    if settings.sharding is Sharding.FSDP and count == 1:
        raise SettingsError("--sharding fsdp parts the model among processes, and there is one: start several")
    return Ranks(dist.get_rank(), count, Control()) if count > 1 else ALONE
