"""The trainer's settings: PPO's, and those of the loop around it."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from rlhf.config import ProcessSettings
from rlhf.security.config import ClientSecurity, ClientTls, CredentialsError
from trainer.ppo.config import PPOConfig
from trainer.ppo.kl import KlPenalty


class ReferencePlace(enum.StrEnum):
    """Where the frozen reference model runs."""

    SERVER = "server"
    TRAINER = "trainer"


class TrackerName(enum.Enum):
    """What --track takes."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class OldLogProbs(enum.StrEnum):
    """Whose log-probabilities of the rollout PPO compares with."""

    TRAINER = "trainer"
    ROLLOUT = "rollout"


class MixedPrecision(enum.StrEnum):
    """What the forward and backward passes compute in; weights, losses and the optimizer are fp32 always."""

    NO = "no"
    BF16 = "bf16"


class LoraExport(enum.StrEnum):
    """What a LoRA run leaves behind as its model."""

    MERGED = "merged"
    ADAPTER = "adapter"


class Sharding(enum.StrEnum):
    """What each of several processes holds of the model."""

    NONE = "none"
    FSDP = "fsdp"


class LrScheduler(enum.StrEnum):
    """The learning rate after warm-up, by transformers' names."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    INVERSE_SQRT = "inverse_sqrt"

    @property
    def ends_at_zero(self) -> bool:
        """Whether the rate depends on how long the run is."""
        return self in (LrScheduler.LINEAR, LrScheduler.COSINE)


_UNTRAINABLE = {
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "min_length",
    "typical_p",
    "num_beams",
}


def _unit(name: str) -> dict[str, Any]:
    return {"unit": name}


class AccessSettings(ProcessSettings):
    """TLS and tokens toward the servers; every file is read again when it changes"""

    policy_tls: bool = Field(False, description="Reach the policy server over TLS")
    reward_tls: bool = Field(False, description="Reach the reward server over TLS")
    tls_ca: Path | None = Field(
        None, description="Authorities that servers' certificates may be of (PEM); unset: the public ones"
    )
    tls_cert: Path | None = Field(None, description="Certificate of this process for servers that ask for one (PEM)")
    tls_key: Path | None = Field(None, description="Its key (PEM, not encrypted)")
    policy_tls_name: str = Field(
        "", description="Name in the policy servers' certificates; unset: the address's, the name of dns:///"
    )
    reward_tls_name: str = Field("", description="Name in the reward server's certificate; unset: that of its address")
    policy_token_file: Path | None = Field(None, description="File with the token for the policy server")
    reward_token_file: Path | None = Field(None, description="File with the token for the reward server")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if (self.tls_ca is not None or self.tls_cert is not None) and not (self.policy_tls or self.reward_tls):
            raise ValueError("tls_ca and tls_cert are of no use without policy_tls or reward_tls")
        for server, name in (("policy", self.policy_tls_name), ("reward", self.reward_tls_name)):
            if name and not getattr(self, f"{server}_tls"):
                raise ValueError(f"{server}_tls_name is of no use without {server}_tls")
        return self

    def policy_security(self) -> ClientSecurity:
        """How the policy server is reached."""
        return ClientSecurity(self._tls(self.policy_tls_name) if self.policy_tls else None, self.policy_token_file)

    def reward_security(self) -> ClientSecurity:
        """How the reward server is reached."""
        return ClientSecurity(self._tls(self.reward_tls_name) if self.reward_tls else None, self.reward_token_file)

    def _tls(self, server_name: str) -> ClientTls:
        return ClientTls(self.tls_ca, self.tls_cert, self.tls_key, server_name)


class TrainerSettings(PPOConfig, AccessSettings):
    """One run. Temperature alone shapes sampling here: whatever else does would not be in the log-probabilities."""

    model_config = SettingsConfigDict(env_prefix="RLHF_TRAINER_", extra="forbid")

    model: str = Field(description="Policy to start from: a folder or a hub name; its tokenizer is the run's")
    policy_server: list[str] = Field(
        min_length=1,
        description="Addresses of the policy servers, each of them one server and no load balancer; dns:///host:port: "
        "every address of that name, looked up again and again",
        json_schema_extra=_unit("host:port"),
    )
    reward_server: str = Field(description="Address of the reward server", json_schema_extra=_unit("host:port"))
    run_dir: Path = Field(description="Folder of the run's files; empty or absent unless resume is given")
    run_id: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        # The ids of samples and updates hold it and are at most 256 bytes.
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Name of the run on the servers, of letters, digits and _.-; unset: made up, then kept",
    )
    check: bool = Field(
        False,
        description="Only verify data, folder, model and servers, print a table, change nothing",
    )
    check_patience: float = Field(
        5.0, gt=0, description="With check: how long a server may take to answer", json_schema_extra=_unit("seconds")
    )
    resume: bool = Field(False, description="Go on from the last checkpoint in run_dir, or begin when there is none")

    data: str = Field(description="Training prompts: a .jsonl, .csv, .tsv or .parquet file, a folder or a hub data set")
    data_split: str = Field("train", description="Split of a hub data set to train on")
    prompt_column: str = Field(
        "prompt", description="Column with the prompt (text or a list of messages); the others go to the reward"
    )
    eval_data: str | None = Field(
        None, description="Held-out prompts; unset: taken out of data, at most a fifth of it, never trained on"
    )
    eval_split: str = Field("test", description="Split of a hub data set to evaluate on")
    eval_prompts: int = Field(
        128, ge=0, description="Held-out prompts per evaluation; 0: no evaluation", json_schema_extra=_unit("prompts")
    )
    eval_every: int = Field(
        10,
        ge=0,
        description="Evaluate every so many steps, at the start and at the end; 0: only then",
        json_schema_extra=_unit("PPO steps"),
    )

    # TRL counts `steps` in samples; a run here is counted in PPO steps, and `ppo_config` translates.
    steps: int = Field(100, ge=1, description="Length of the run", json_schema_extra=_unit("PPO steps"))
    save_every: int = Field(
        10, ge=1, description="Write a checkpoint every so many steps", json_schema_extra=_unit("PPO steps")
    )
    keep_checkpoints: int = Field(
        3, ge=1, description="Newest checkpoints to keep", json_schema_extra=_unit("checkpoints")
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Logits are divided by it, in sampling and in training alike",
        json_schema_extra=_unit("ratio"),
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest completion", json_schema_extra=_unit("tokens"))
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="Longer prompts are dropped; unset: what max_new_tokens leaves of the model's context",
        json_schema_extra=_unit("tokens"),
    )
    reference: ReferencePlace = Field(
        ReferencePlace.SERVER, description="Where the frozen reference runs: the policy server, or this process"
    )
    reference_model: str | None = Field(
        None, description="Reference to load when reference is trainer; unset: what model names"
    )
    other_reference: bool = Field(
        False, description="The served reference may be another model than the one that the run starts from"
    )
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Mean gap between trainer and policy server at which a start fails and a step warns; unset: 0.001 "
        "in float32, 0.1 where either computes in 16 bits",
        json_schema_extra=_unit("nats per token"),
    )
    old_logprobs: OldLogProbs = Field(
        OldLogProbs.TRAINER, description="Old log-probabilities: recomputed by the trainer, or as sampled (rollout)"
    )

    mixed_precision: MixedPrecision = Field(
        MixedPrecision.NO, description="Compute in fp32 (no) or by bf16 autocast; weights and losses are fp32 always"
    )

    lora_rank: int | None = Field(
        None,
        ge=1,
        description="Train a LoRA adapter of this rank in place of the weights; unset: all weights",
        json_schema_extra=_unit("rank"),
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="What the adapter adds is multiplied by this / lora_rank; unset: twice the rank",
        json_schema_extra=_unit("ratio"),
    )
    lora_targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the linear layers that it adapts, such as q_proj,v_proj; unset: all but the head",
    )
    lora_export: LoraExport = Field(
        LoraExport.MERGED,
        description="The finished run's model: whole, with the adapter in its weights (merged), or the adapter alone",
    )

    lr_scheduler: LrScheduler = Field(
        LrScheduler.CONSTANT,
        description="What becomes of the learning rate: constant, linear and cosine (down to 0 at the last of steps), "
        "inverse_sqrt",
    )
    lr_warmup_steps: int = Field(
        0, ge=0, description="Steps in which it rises from 0 before that", json_schema_extra=_unit("PPO steps")
    )

    sharding: Sharding = Field(
        Sharding.NONE,
        description="Under several processes: each holds the model (none, DDP), or a part of it (fsdp, FSDP2)",
    )
    processes: int | None = Field(
        None,
        ge=1,
        description="Refuse to start unless so many train together; unset: as many as the launcher started",
        json_schema_extra=_unit("processes"),
    )

    max_staleness: int = Field(
        0,
        ge=0,
        description="Begin rollouts while earlier steps are learned, with weights up to so many versions old; 0: every "
        "token is sampled by the weights that its step starts from",
        json_schema_extra=_unit("versions"),
    )
    importance_sampling: bool = Field(
        True,
        description="With max_staleness above 0, weigh each token by how much likelier the policy has become to sample "
        "it, at most 2",
    )
    oversample: float = Field(
        0.0,
        ge=0,
        description="Draw so many more prompts than batch_size, as a fraction of it, begin a step when batch_size are "
        "scored and drop the stragglers, which are long more often than not",
        json_schema_extra=_unit("ratio"),
    )
    rollout_concurrency: int = Field(
        64, ge=1, description="Generate calls in flight, over all policy servers", json_schema_extra=_unit("calls")
    )
    weights_folder: Path | None = Field(
        None,
        description="The policy server's --weights-root as this process sees it: weights go through a file there, "
        "which is faster than the stream on one host",
    )
    policy_timeout: float = Field(
        300.0, gt=0, description="Deadline of one Generate or LogProbs call", json_schema_extra=_unit("seconds")
    )
    reward_timeout: float = Field(
        60.0, gt=0, description="Deadline of one Score call", json_schema_extra=_unit("seconds")
    )
    publish_timeout: float = Field(
        600.0, gt=0, description="Deadline of one transfer of the weights", json_schema_extra=_unit("seconds")
    )

    threads: int | None = Field(
        None, ge=1, description="CPU threads for the model; unset: torch's default", json_schema_extra=_unit("threads")
    )
    reproducible: bool = Field(
        False,
        description="Deterministic algorithms only: on CPU a resumed run repeats an uninterrupted one bit for bit; not "
        "with max_staleness or oversample, where time decides what a step trains on",
    )
    sample_lines: int = Field(
        4, ge=0, description="Training samples per step to keep in samples.jsonl", json_schema_extra=_unit("samples")
    )
    track: list[TrackerName] = Field(
        default_factory=list, description="Trackers beside metrics.jsonl: tensorboard, wandb"
    )

    metrics_linger: float = Field(
        0.0,
        ge=0,
        description="After the end, how long to wait for one more scrape of the metrics, which then tells of it",
        json_schema_extra=_unit("seconds"),
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_log_probabilities_leave_out(cls, values: Any) -> Any:
        if isinstance(values, dict) and (given := sorted(_UNTRAINABLE & values.keys())):
            raise ValueError(
                f"{', '.join(given)}: only temperature may shape sampling in training; the log-probabilities that PPO "
                "compares would not be those of the distribution that is sampled, and the KL estimate turns negative"
            )
        return values

    @field_validator("policy_server")
    @classmethod
    def _check_policy_server(cls, servers: list[str]) -> list[str]:
        for server in servers:
            if not re.fullmatch(r"unix:.+|(dns:///)?([^:/\s]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}", server):
                raise ValueError(f"{server!r} is none of host:port, unix:path and dns:///host:port")
        return servers

    @model_validator(mode="after")
    def _check_run(self) -> Self:
        if self.kl_penalty is KlPenalty.FULL and self.old_logprobs is OldLogProbs.ROLLOUT:
            raise ValueError(
                "kl_penalty=full needs the old policy's whole distribution, which a rollout does not bring: "
                "set old_logprobs=trainer"
            )
        if self.other_reference and self.reference is ReferencePlace.TRAINER:
            raise ValueError("other_reference is about a served reference; reference=trainer takes reference_model")
        if self.reference is ReferencePlace.SERVER:
            if self.kl_penalty is KlPenalty.FULL:
                raise ValueError(
                    "kl_penalty=full needs the reference's whole distribution, which a served reference does not send: "
                    "set reference=trainer"
                )
            if self.reference_model is not None:
                raise ValueError("reference_model is only used with reference=trainer; give --reference to the server")
        for name in ("lora_alpha", "lora_targets"):
            if self.lora_rank is None and (given := getattr(self, name)) is not None:
                raise ValueError(f"{name} ({given}) is of an adapter, and there is none: set lora_rank")
        if self.lr_warmup_steps >= self.steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must be less than steps ({self.steps})")
        if self.reproducible and self.max_staleness > 0:
            raise ValueError(
                f"max_staleness={self.max_staleness} can't be reproducible: how far a completion is when new weights "
                "come is a matter of time; set max_staleness=0 or leave reproducible out"
            )
        if self.reproducible and self.oversample > 0:
            raise ValueError(
                f"oversample={self.oversample} can't be reproducible: which completions are scored first is a matter "
                "of time; set oversample=0 or leave reproducible out"
            )
        for security, target in (
            *((self.policy_security(), server) for server in self.policy_server),
            (self.reward_security(), self.reward_server),
        ):
            try:
                security.require_fit(target)
            except CredentialsError as error:
                raise ValueError(str(error)) from error
        return self

    def ppo_config(self) -> PPOConfig:
        """PPO's own settings."""
        values = {name: getattr(self, name) for name in PPOConfig.model_fields}
        return PPOConfig(**{**values, "steps": self.steps * self.batch_size})
