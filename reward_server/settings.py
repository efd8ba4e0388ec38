"""The reward server's settings."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from reward_server.kinds import Limits
from rlhf.security.settings import SecuredServerSettings


class RewardSettings(SecuredServerSettings):
    """One reward, and how it is called."""

    model_config = SettingsConfigDict(env_prefix="RLHF_REWARD_", extra="forbid")

    reward: str = Field(
        description="What scores: module:function, path/file.py:function, a built-in (vader, length, regex), a kind "
        "(model, human, remote, http, judge, composite), or a composite's file.yaml"
    )
    reward_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the reward, as a JSON or YAML mapping"
    )
    reward_version: str = Field(
        default="",
        description="Version told to trainers, which pin it for a run; unset: made from source and options",
    )
    reward_threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Calls at once of a function that is not async",
        json_schema_extra={"unit": "threads"},
    )
    batch_size: int = Field(
        default=64, ge=1, description="Most samples in one call of the function", json_schema_extra={"unit": "samples"}
    )
    max_samples: int = Field(
        default=256, ge=1, le=65536, description="Most samples in one Score call", json_schema_extra={"unit": "samples"}
    )
    max_concurrent_calls: int = Field(
        default=8,
        ge=1,
        description="Score calls at once that a client is told to keep to; also calls at once of an async function",
        json_schema_extra={"unit": "calls"},
    )
    max_queue_samples: int = Field(
        default=4096,
        ge=1,
        description="Samples that wait or run; beyond them calls are refused with a time to come back",
        json_schema_extra={"unit": "samples"},
    )
    remember_samples: int = Field(
        default=65536,
        ge=0,
        description="Final outcomes kept, so that a repeated call gets the first answer",
        json_schema_extra={"unit": "samples"},
    )

    def limits(self) -> Limits:
        """What the reward may do at once."""
        return Limits(
            batch_size=self.batch_size,
            max_queue_samples=self.max_queue_samples,
            remember_samples=self.remember_samples,
            threads=self.reward_threads,
            concurrency=self.max_concurrent_calls,
        )
