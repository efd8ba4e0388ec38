"""Sampled frequencies against the exact probabilities, which transformers' own processors give in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from policy_server.engine.protocol import Sampling
from policy_server.engine.sampling import Draw, draw
from tests.policy_server.engine.architectures import EOS, VOCAB, loaded, make_model
from tests.policy_server.engine.harness import generate, request, running
from tests.policy_server.engine.processors import processed_by_transformers

TOKENS = 200_000
AT_ONCE = 20_000
LOWEST_P_VALUE = 1e-4
LEAST_EXPECTED = 5.0
ENDING = (0, 7)
HISTORY = (0, 1, 2, 3, 20, 40)
PROMPT = 4  # tokens of HISTORY

SETTINGS = {
    "as it is": Sampling(),
    "temperature below 1": Sampling(temperature=0.6),
    "temperature above 1": Sampling(temperature=1.7),
    "top_k": Sampling(top_k=12),
    "top_p": Sampling(top_p=0.85),
    "min_p": Sampling(min_p=0.04),
    "repetition_penalty above 1": Sampling(repetition_penalty=1.6),
    "repetition_penalty below 1": Sampling(repetition_penalty=0.7),
    "min_new_tokens": Sampling(min_new_tokens=5),
    "all": Sampling(
        temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, min_new_tokens=5, max_new_tokens=9
    ),
}


def fixed_logits() -> Tensor:
    """From likely tokens to some that 200,000 draws hardly show, in a random order."""
    return torch.linspace(3.0, -7.0, 50)[torch.randperm(50, generator=torch.Generator().manual_seed(3))]


def exact_logprobs(
    logits: Tensor, sampling: Sampling, *, history: Sequence[int], prompt: int, ending: Sequence[int]
) -> Tensor:
    """Log-probabilities in float64 of the token after `history`, whose first `prompt` tokens are the prompt."""
    processed = processed_by_transformers(logits.double(), sampling, history=history, prompt=prompt, ending=ending)
    return processed.log_softmax(dim=-1)


def p_value(observed: Tensor, logprobs: Tensor) -> float:
    """The chi-squared test's (Pearson 1900); tokens that are expected less than 5 times make one bin together."""
    expected = logprobs.exp() * observed.sum()
    rare = expected < LEAST_EXPECTED
    bins = [(observed[~rare], expected[~rare]), (observed[rare].sum().view(1), expected[rare].sum().view(1))]
    if bins[1][1] < LEAST_EXPECTED:  # too few for a bin of its own: into the smallest
        smallest = int(bins[0][1].argmin())
        for kept, more in zip(bins[0], bins[1], strict=True):
            kept[smallest] += more[0]
        del bins[1]
    seen, due = (torch.cat(each).double() for each in zip(*bins, strict=True))
    statistic = ((seen - due) ** 2 / due).sum()
    freedom = torch.tensor(len(due) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_and_returned_logprobs_are_the_exact_probabilities(name: str) -> None:
    sampling = SETTINGS[name]
    logits = fixed_logits()
    logprobs = exact_logprobs(logits, sampling, history=HISTORY, prompt=PROMPT, ending=ENDING)
    seen = torch.zeros(len(logits), dtype=torch.bool)
    seen[list(HISTORY)] = True
    observed = torch.zeros(len(logits))
    for start in range(0, TOKENS, AT_ONCE):
        # As the engine draws: the completions of one request, all at one place, each with a seed of its own.
        drawn = draw(
            logits.expand(AT_ONCE, -1),
            [
                Draw(
                    sampling,
                    seed=seed,
                    position=len(HISTORY) - PROMPT,
                    ending_ids=ENDING,
                    seen=seen if sampling.repetition_penalty != 1.0 else None,
                    processed_logprob=True,
                )
                for seed in range(start, start + AT_ONCE)
            ],
        )
        tokens = torch.tensor(drawn.token_ids)
        observed += torch.bincount(tokens, minlength=len(logits))
        returned = torch.tensor(drawn.processed_logprobs, dtype=torch.float64)
        torch.testing.assert_close(returned, logprobs[tokens], rtol=0, atol=1e-5)
    assert observed[logprobs == -math.inf].sum() == 0
    assert p_value(observed, logprobs) > LOWEST_P_VALUE


def test_the_test_itself_notices_probabilities_that_are_a_little_off() -> None:
    """A temperature that is wrong by 2 % is found in as many tokens; the right one is not."""
    logits = fixed_logits()
    drawn = torch.multinomial(logits.softmax(-1), TOKENS, True, generator=torch.Generator().manual_seed(1))
    observed = torch.bincount(drawn, minlength=len(logits)).float()
    assert p_value(observed, logits.double().log_softmax(-1)) > LOWEST_P_VALUE
    assert p_value(observed, (logits.double() / 1.02).log_softmax(-1)) < LOWEST_P_VALUE


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.3, min_new_tokens=1)],
    ids=["as it is", "many settings"],
)
async def test_what_the_engine_samples_has_the_exact_probabilities(sampling: Sampling) -> None:
    prompt = [5, 6, 7]
    model = make_model("gpt2")
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    logprobs = exact_logprobs(logits, sampling, history=prompt, prompt=len(prompt), ending=[EOS])
    fields = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    async with running(loaded(model), max_batch_rows=128) as engine:
        completions = await generate(engine, request(prompt, **{**fields, "n": 4000, "max_new_tokens": 1, "seed": 11}))
    tokens = torch.tensor([each.token_ids for each in completions]).flatten()
    returned = torch.tensor([each.processed_logprobs for each in completions], dtype=torch.float64).flatten()
    torch.testing.assert_close(returned, logprobs[tokens], rtol=0, atol=1e-4)
    assert p_value(torch.bincount(tokens, minlength=VOCAB).float(), logprobs) > LOWEST_P_VALUE
