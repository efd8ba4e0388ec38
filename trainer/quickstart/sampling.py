"""TRL's generation settings: read, warned about, and translated for a policy server."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

# The value of each transformers setting that leaves the sampled distribution alone. Anything else makes tokens come
# from another distribution than the one whose log-probabilities PPO compares.
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "logits_processor": None,
}

# What transformers generates when neither max_new_tokens nor max_length is given.
_TRANSFORMERS_NEW_TOKENS = 20


class SamplingShapeWarning(UserWarning):
    """Generation settings shape sampling but not the log-probabilities that PPO compares."""


@dataclass(frozen=True)
class ServedSampling:
    """What one Generate request may ask for, before the prompt's length is known."""

    max_new_tokens: int | None
    max_length: int | None
    temperature: float
    top_k: int
    top_p: float
    min_new_tokens: int
    min_length: int

    def most_new_tokens(self, prompt_tokens: int) -> int:
        """The most tokens to generate after a prompt of this length: `max_length` counts the prompt too.

        Raises ValueError when the prompt alone is longer.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _TRANSFORMERS_NEW_TOKENS
        if self.max_length <= prompt_tokens:
            raise ValueError(f"max_length is {self.max_length}, but a prompt has {prompt_tokens} tokens already")
        return self.max_length - prompt_tokens

    def least_new_tokens(self, prompt_tokens: int) -> int:
        """The fewest tokens to generate after a prompt of this length."""
        return max(self.min_new_tokens, self.min_length - prompt_tokens)


def switched_off(generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same settings, TRL's ways of saying "off" (`min_length=-1`, `top_k=0.0`) turned into transformers 5's."""
    settings = dict(generation_kwargs)
    if settings.get("top_k") is not None:
        settings["top_k"] = int(settings["top_k"])
    for name in ("min_length", "min_new_tokens"):
        if settings.get(name) is not None and settings[name] < 0:
            settings[name] = 0
    return settings


def shaping_settings(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings`, over `defaults` where unset, that change which distribution tokens are drawn from."""
    effective = {name: settings.get(name, defaults.get(name)) for name in _NEUTRAL}
    shaping = {name: value for name, value in effective.items() if value and value != _NEUTRAL[name]}
    if not (settings.get("do_sample", defaults.get("do_sample")) or False):
        # Greedy search ignores the warpers, but draws from no distribution at all.
        return {"do_sample": False, **{name: shaping[name] for name in shaping if name not in _WARPERS}}
    return shaping


_WARPERS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"})


def warn_of_shaping(shaping: dict[str, Any]) -> None:
    """Say once what a negative KL estimate would come from."""
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(shaping.items()))
    warnings.warn(
        f"{listed}: the tokens are not drawn from the distribution whose log-probabilities step() compares, so the KL "
        "estimate is biased and can turn negative. For plain sampling pass do_sample=True, top_k=0, top_p=1.0, "
        "temperature=1.0, min_length=-1.",
        SamplingShapeWarning,
        stacklevel=3,
    )


def warn_of_negative_kl(kl: Any) -> None:
    """Say so when the mean KL per sample, in nats, is below −1 (TRL's limit): noise seldom is."""
    if float(kl) < -1.0:
        warnings.warn(
            f"the KL estimate is {float(kl):.2f} nats: the responses are likelier under the reference than under the "
            "policy, as when they were sampled with settings that shape the distribution; training may fail",
            SamplingShapeWarning,
            stacklevel=3,
        )


def served_sampling(settings: dict[str, Any], *, eos_token_ids: tuple[int, ...]) -> ServedSampling:
    """The Generate request's settings for transformers' generation arguments.

    `eos_token_ids` are the served model's. Padding and caching arguments have no meaning for a server that pads
    nothing and are dropped. Raises ValueError for arguments that a server can't be asked for.
    """
    rest = dict(settings)
    for name in ("pad_token_id", "bos_token_id", "use_cache"):
        rest.pop(name, None)
    eos = rest.pop("eos_token_id", None)
    if eos is not None and sorted({eos} if isinstance(eos, int) else set(eos)) != sorted(eos_token_ids):
        raise ValueError(f"eos_token_id={eos!r}: the served model ends a completion at {sorted(eos_token_ids)}")
    sampled = rest.pop("do_sample", False)
    temperature = rest.pop("temperature", None)
    result = ServedSampling(
        max_new_tokens=rest.pop("max_new_tokens", None),
        max_length=rest.pop("max_length", None),
        temperature=(1.0 if temperature is None else float(temperature)) if sampled else 0.0,
        top_k=rest.pop("top_k", None) or 0,
        top_p=rest.pop("top_p", None) or 1.0,
        min_new_tokens=rest.pop("min_new_tokens", None) or 0,
        min_length=rest.pop("min_length", None) or 0,
    )
    allowed = {**_NEUTRAL, "num_return_sequences": 1}
    if unmapped := sorted(
        name for name, value in rest.items() if value is not None and (name not in allowed or value != allowed[name])
    ):
        raise ValueError(
            f"{', '.join(unmapped)}: a policy server can't be asked for this through generate(); it takes do_sample, "
            "temperature, top_k, top_p, max_new_tokens, max_length, min_new_tokens and min_length"
        )
    return result
