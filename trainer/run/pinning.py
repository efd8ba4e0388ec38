"""What the run needs of its servers, and what must not change under it: each mismatch told with how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.clients.policy import ModelInfo
from trainer.run.checkpoints import Pins


class PinError(RuntimeError):
    """A server is not what the run needs or began with; the message says what differs and what to do."""


@dataclass(frozen=True)
class Needs:
    """What the trainer's model and settings ask of the policy server."""

    tokenizer_digest: str
    logit_columns: int
    context_tokens: int
    """The longest prompt and completion that the run may send."""


def check_tokenizer(served: ModelInfo, needs: Needs, *, target: str) -> None:
    """Raise PinError unless the server turns text into the trainer's ids."""
    if served.tokenizer_digest != needs.tokenizer_digest:
        raise PinError(
            f"policy server {target} has another tokenizer ({served.tokenizer_digest}) than the trainer's --model "
            f"({needs.tokenizer_digest}): start it with the same --model"
        )


def check_logit_columns(served: ModelInfo, needs: Needs, *, target: str) -> None:
    """Raise PinError unless the served model's logits are as wide as the trainer's."""
    if served.vocab_size != needs.logit_columns:
        raise PinError(
            f"policy server {target} has {served.vocab_size} logit columns, the trainer's --model "
            f"{needs.logit_columns}: start it with the same --model"
        )


def check_context(served: ModelInfo, needs: Needs, *, target: str) -> None:
    """Raise PinError when the longest sequence of the run is more than the server takes."""
    if served.max_context_tokens < needs.context_tokens:
        raise PinError(
            f"policy server {target} takes {served.max_context_tokens} tokens of prompt and completion, this run "
            f"may need {needs.context_tokens}: lower --max-prompt-tokens or --max-new-tokens, or raise its limit "
            "(--max-context-tokens)"
        )


def check_logprobs(served: ModelInfo, *, target: str) -> None:
    """Raise PinError unless completions come with the log-probabilities that they were drawn from."""
    if not served.processed_logprobs:
        raise PinError(
            f"policy server {target} can't return the log-probabilities that tokens were drawn from "
            "(LOG_PROB_KIND_PROCESSED), which training needs: use a server that can"
        )


def check_served_model(served: ModelInfo, needs: Needs, *, target: str) -> None:
    """All of the above."""
    check_tokenizer(served, needs, target=target)
    check_logit_columns(served, needs, target=target)
    check_context(served, needs, target=target)
    check_logprobs(served, target=target)


def check_pins(pins: Pins, *, owner: str, reference_digest: str, tokenizer_digest: str) -> None:
    """Raise PinError when the reference or the trainer's own tokenizer is not the one that the run began with.

    `owner`: who has the reference, for the message.
    """
    if tokenizer_digest != pins.tokenizer_digest:
        raise PinError(
            f"the tokenizer of --model ({tokenizer_digest}) is not the one that this run began with "
            f"({pins.tokenizer_digest}): put its files back, or begin a new run"
        )
    if reference_digest != pins.reference_digest:
        raise PinError(
            f"the reference model of {owner} ({reference_digest}) is not the one that this run began with "
            f"({pins.reference_digest}); the KL would silently start again from there. Use the reference of the run's "
            "beginning (a policy server started from a trained folder takes that as its reference, unless --reference "
            "says otherwise)"
        )


def same_weights(served: ModelInfo, digest: Callable[[torch.dtype], str]) -> bool | None:
    """Whether a served model was loaded with the weights of `digest`; None when its digest is not of our making.

    digest: the `weights_digest` of weights in the type that the server serves.
    """
    dtype = getattr(torch, served.serving_dtype, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return None
    ours = digest(dtype)
    if served.weights_digest.partition(":")[0] != ours.partition(":")[0]:
        return None
    return served.weights_digest == ours
