"""What must not change under a run: the served reference, the tokenizer and the reward, checked at every start."""

from __future__ import annotations

from trainer.clients.policy import PolicyClient
from trainer.run.checkpoints import Pins


class PinError(RuntimeError):
    """A server is not what the run needs or began with; the message says what differs and what to do."""


async def check_policy_server(
    policy: PolicyClient, *, tokenizer_digest: str, vocab_size: int, context_tokens: int
) -> None:
    """Raise PinError unless the server fits the trainer's model and the run.

    `context_tokens`: the longest prompt and completion that the run may send.
    """
    info = await policy.get_model()
    if info.tokenizer_digest != tokenizer_digest:
        raise PinError(
            f"policy server {policy.target} has another tokenizer ({info.tokenizer_digest}) than the trainer's --model "
            f"({tokenizer_digest}): start it with the same --model"
        )
    if info.vocab_size != vocab_size:
        raise PinError(
            f"policy server {policy.target} has {info.vocab_size} logit columns, the trainer's --model {vocab_size}: "
            "start it with the same --model"
        )
    if info.max_context_tokens < context_tokens:
        raise PinError(
            f"policy server {policy.target} takes {info.max_context_tokens} tokens of prompt and completion, this run "
            f"may need {context_tokens}: lower --max-prompt-tokens or --max-new-tokens, or raise its limit"
        )
    if not info.processed_logprobs:
        raise PinError(
            f"policy server {policy.target} can't return the log-probabilities that tokens were drawn from "
            "(LOG_PROB_KIND_PROCESSED), which training needs"
        )


def check_pins(pins: Pins, *, owner: str, reference_digest: str, tokenizer_digest: str) -> None:
    """Raise PinError when the reference or the trainer's own tokenizer is not the one that the run began with.

    `owner`: who has the reference, for the message.
    """
    if tokenizer_digest != pins.tokenizer_digest:
        raise PinError(
            f"the tokenizer of --model ({tokenizer_digest}) is not the one that this run began with "
            f"({pins.tokenizer_digest})"
        )
    if reference_digest != pins.reference_digest:
        raise PinError(
            f"the reference model of {owner} ({reference_digest}) is not the one that this run began with "
            f"({pins.reference_digest}); the KL would silently start again from there. Use the reference of the run's "
            "beginning (a policy server started from a trained folder takes that as its reference, unless --reference "
            "says otherwise)"
        )
