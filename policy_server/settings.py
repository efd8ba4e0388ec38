"""Every setting of the policy server. Kept free of torch, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from rlhf.security.settings import SecuredServerSettings


class PolicySettings(SecuredServerSettings):
    """Serves a causal language model: generation, log-probabilities, and new weights while it runs."""

    model_config = SettingsConfigDict(env_prefix="RLHF_POLICY_")

    model: str = Field(description="Folder or hub name of the policy, anything AutoModelForCausalLM loads.")
    reference: str | None = Field(
        default=None, description='Folder or hub name of the frozen model "reference"; unset = the initial policy.'
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="What both models are served in; log-probabilities are those of these weights."
    )
    device: str = Field(default="auto", description='"auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" …')
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of the model; unset = torch's choice. Equal bits need equal threads.",
        json_schema_extra={"unit": "threads"},
    )
    engine: Literal["own", "transformers"] = Field(
        default="own", description="What runs the policy: our batches, or transformers' own continuous batching."
    )
    reproducible: bool = Field(
        default=False,
        description="Tokens and log-probabilities bit for bit a function of weights, request and threads; slower.",
    )
    pack_weights: bool = Field(
        default=True,
        description="On a CPU in float32, keep the policy's linear weights twice, once ordered for decoding: faster.",
    )
    managed: bool = Field(
        default=False, description="PolicyService is NOT_SERVING until a trainer has published its weights."
    )
    max_batch_rows: int = Field(
        default=64, ge=1, description="Most completions in one batch.", json_schema_extra={"unit": "completions"}
    )
    max_queue_requests: int = Field(
        default=1024,
        ge=1,
        description="Requests that may wait; one more is answered RESOURCE_EXHAUSTED with RetryInfo.",
        json_schema_extra={"unit": "requests"},
    )
    max_context_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of prompt and completion together; unset = what the model was made for.",
        json_schema_extra={"unit": "tokens"},
    )
    cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory for key-value caches; unset = half of what is free at the start, an update's set aside.",
        json_schema_extra={"unit": "bytes"},
    )
    default_max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="max_new_tokens of a request that leaves it unset.",
        json_schema_extra={"unit": "tokens"},
    )
    prefill_tokens: int = Field(
        default=2048,
        ge=1,
        description="Most tokens of prompts that are read between two decode steps; longer ones are read in pieces.",
        json_schema_extra={"unit": "tokens"},
    )
    score_tokens: int = Field(
        default=4096, ge=1, description="Most tokens in one LogProbs forward.", json_schema_extra={"unit": "tokens"}
    )
    weights_root: Path | None = Field(
        default=None, description="Only below this folder may a writer name safetensors directories; unset = none."
    )
    max_staging_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Largest update held beside the live weights; unset = every parameter of the policy in float32.",
        json_schema_extra={"unit": "bytes"},
    )
    keep_staging: bool = Field(
        default=True, description="Keep the memory of a weight update for the next one: faster, as new memory is slow."
    )

    @model_validator(mode="after")
    def _engine_can_reproduce(self) -> PolicySettings:
        if self.reproducible and self.engine == "transformers":
            raise ValueError('engine = "transformers" batches requests with others: it can\'t be reproducible')
        if self.cache_bytes is not None and self.engine == "transformers":
            raise ValueError('engine = "transformers" sizes its cache itself: leave cache_bytes out')
        return self
