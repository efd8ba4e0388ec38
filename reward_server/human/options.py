"""The options of the human kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward_server.human.rules import Aggregate, OnExpiry, Rules, Scale
from rlhf.addresses import is_loopback

DEFAULT_DATABASE = "sqlite:///ratings.db"


class ScaleOptions(BaseModel):
    """What raters choose from: steps from `min` to `max`, or named choices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float = Field(default=1.0, description="Lowest value")
    max: float = Field(default=5.0, description="Highest value")
    step: float = Field(default=1.0, description="From one value to the next")
    labels: dict[str, float] | None = Field(
        default=None, description="Instead: names of the choices and their values, e.g. {bad: 0, good: 1}"
    )

    @model_validator(mode="after")
    def _is_a_scale(self) -> Self:
        if self.labels is not None and self.model_fields_set - {"labels"}:
            raise ValueError("a scale has either labels or min, max and step")
        self.made()
        return self

    def made(self) -> Scale:
        """As the rules know it. Raises ValueError if it is none."""
        return Scale.of_steps(self.min, self.max, self.step) if self.labels is None else Scale.of_labels(self.labels)


class HumanOptions(BaseModel):
    """How people rate, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(
        default="How good is this completion?", min_length=1, description="What raters are asked, above each completion"
    )
    instructions: str = Field(default="", description="Guidelines that raters can unfold, as plain text")
    title: str = Field(default="Rate completions", min_length=1, description="Title of the page")
    scale: ScaleOptions = Field(
        default=ScaleOptions(), description="What raters choose from: {min, max, step}, or {labels: {name: value, …}}"
    )
    reward_range: tuple[float, float] = Field(
        default=(-1.0, 1.0), description="Rewards of the lowest and the highest value; in between in proportion"
    )
    ratings_per_sample: int = Field(
        default=1, ge=1, le=100, description="Ratings that make a reward, each by another person [ratings]"
    )
    aggregate: Aggregate = Field(default=Aggregate.MEAN, description="How several ratings become one: mean or median")
    skips_to_abstain: int = Field(
        default=1, ge=1, description="Skips, each by another person, after which a sample is abstained from [skips]"
    )
    expire_seconds: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Age at which a sample that is not rated is given up; 0 = never [seconds]",
    )
    on_expiry: OnExpiry = Field(
        default=OnExpiry.ABSTAIN, description="What is answered then: abstain, or fail with the code EXPIRED"
    )
    lease_seconds: float = Field(
        default=300.0,
        gt=0,
        allow_inf_nan=False,
        description="How long a sample is kept for the person who was shown it [seconds]",
    )
    undo_seconds: float = Field(
        default=10.0,
        ge=0,
        le=3600,
        description="How long a rating is kept from the trainer, so that it can be undone [seconds]",
    )
    retry_after: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="When a trainer is told to ask again for a sample that is not rated yet [seconds]",
    )
    database: str = Field(
        default=DEFAULT_DATABASE, description="Where ratings are kept: sqlite:///file or postgresql://host/database"
    )
    listen: str = Field(
        default="127.0.0.1:8080",
        pattern=r"^.+:\d+$",
        description="Address of the page as host:port; port 0 = the OS picks one",
    )
    secure_cookies: bool = Field(
        default=False, description="Whether browsers reach the page by https, through a proxy; cookies need it then"
    )
    insecure: bool = Field(
        default=False, description="Serve an address other than loopback even if browsers reach the page by plain http"
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(), description="Addresses or networks of proxies whose X-Forwarded-For says who the caller is"
    )
    endpoint_file: Path | None = Field(
        default=None, description="File that is told the page's address once it is served, as JSON"
    )

    @model_validator(mode="after")
    def _rewards_grow(self) -> Self:
        worst, best = self.reward_range
        if not (math.isfinite(worst) and math.isfinite(best) and worst < best):
            raise ValueError("reward_range is [lowest, highest], both finite, and higher is better")
        return self

    @model_validator(mode="after")
    def _is_out_of_reach_or_behind_https(self) -> Self:
        if not (self.secure_cookies or self.insecure or is_loopback(self.listen)):
            raise ValueError(
                f"listen is {self.listen}, which other machines can reach, and the page is plain http, raters' tokens "
                "included: put a proxy with TLS before it and set secure_cookies (see docs/rewards/human.md), or say "
                "insecure where the network itself keeps strangers out"
            )
        return self

    def rules(self) -> Rules:
        """What of them decides about rewards."""
        return Rules(
            scale=self.scale.made(),
            reward_range=self.reward_range,
            ratings_per_sample=self.ratings_per_sample,
            aggregate=self.aggregate,
            skips_to_abstain=self.skips_to_abstain,
            expire_seconds=self.expire_seconds,
            on_expiry=self.on_expiry,
            lease_seconds=self.lease_seconds,
            undo_seconds=self.undo_seconds,
            retry_after=self.retry_after,
            question=self.question,
            instructions=self.instructions,
        )
