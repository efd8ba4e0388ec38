from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_server.engine.protocol import Sampling
from policy_server.engine.sampling import Draw, draw, inverse_cdf, process, uniforms
from tests.policy_server.engine.processors import processed_by_transformers

VOCAB = 31
ENDING = (3, 30)
ALMOST_ONE = 1.0 - 2.0**-53

words = st.integers(0, 2**64 - 1)
settings_of_a_row = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.3, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 10, VOCAB, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.7]),
    min_new_tokens=st.sampled_from([0, 3]),
)


@given(rows=st.lists(settings_of_a_row, min_size=1, max_size=5), seed=st.integers(0, 1000), position=st.integers(0, 5))
def test_each_row_is_processed_as_transformers_processes_it_alone(
    rows: list[Sampling], seed: int, position: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 4
    history = torch.randint(VOCAB, (4 + position,), generator=generator).tolist()
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[history] = True
    draws = [Draw(row, 0, position, ENDING, seen=seen if row.repetition_penalty != 1.0 else None) for row in rows]
    processed = process(logits, draws)
    for index, row in enumerate(rows):
        expected = processed_by_transformers(logits[index], row, history=history, prompt=4, ending=ENDING)
        assert torch.equal(processed[index], expected)


@given(
    temperature=st.floats(0, 2.0**127, width=32),
    penalty=st.floats(0, 2.0**127, width=32, exclude_min=True),
    top_p=st.floats(0, 1, width=32, exclude_min=True),
    min_p=st.floats(0, 1, width=32),
    scale=st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_no_legal_setting_makes_a_draw_impossible(
    temperature: float, penalty: float, top_p: float, min_p: float, scale: float
) -> None:
    row = Sampling(temperature=temperature, repetition_penalty=penalty, top_p=top_p, min_p=min_p)
    logits = torch.linspace(-1, 1, VOCAB).unsqueeze(0) * scale
    for seen in (torch.ones(VOCAB, dtype=torch.bool), torch.arange(VOCAB) % 2 == 0):
        drawn = draw(logits, [Draw(row, 1, 0, seen=seen, raw_logprob=True, processed_logprob=True)])
        assert drawn.valid == [True]
        assert math.isfinite(drawn.raw_logprobs[0] or 0.0)
        assert math.isfinite(drawn.processed_logprobs[0] or 0.0)


def test_ties_survive_top_k_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    processed = process(logits, [Draw(Sampling(top_k=1), 0, 0)])
    assert processed.tolist() == [[1.0, 1.0, 1.0, -math.inf]]


def test_rows_without_settings_are_not_touched() -> None:
    logits = torch.randn(2, VOCAB)
    assert process(logits, [Draw(Sampling(), 0, 0)] * 2) is logits


@given(seed=words, position=st.integers(0, 2**32))
def test_a_uniform_is_below_one_and_a_function_of_seed_and_position(seed: int, position: int) -> None:
    def one(*pairs: tuple[int, int]) -> list[float]:
        seeds, positions = (np.array(each, dtype=np.uint64) for each in zip(*pairs, strict=True))
        return uniforms(seeds, positions).tolist()

    [alone] = one((seed, position))
    assert 0.0 <= alone < 1.0
    assert one((1, 2), (seed, position), (3, 4))[1] == alone


def test_uniforms_are_uniform_and_independent_along_positions_and_across_neighbouring_seeds() -> None:
    count = 20_000
    zeros, steps = np.zeros(count, dtype=np.uint64), np.arange(count, dtype=np.uint64)
    along, across, next_seed = uniforms(zeros, steps), uniforms(steps, zeros), uniforms(zeros + np.uint64(1), steps)
    for numbers in (along, across, next_seed):
        histogram = np.histogram(numbers, bins=64, range=(0, 1))[0]
        statistic = float(((histogram - count / 64) ** 2 / (count / 64)).sum())
        assert statistic < 63 + 4 * (2 * 63) ** 0.5
        assert abs(float(np.corrcoef(numbers[1:], numbers[:-1])[0, 1])) < 0.03
    assert abs(float(np.corrcoef(along, next_seed)[0, 1])) < 0.03
    assert abs(float(np.corrcoef(along, across)[0, 1])) < 0.03


def test_the_random_stream_of_a_seed_never_changes() -> None:
    numbers = uniforms(np.array([0, 1, 2**64 - 1], dtype=np.uint64), np.array([0, 1, 2], dtype=np.uint64))
    assert numbers.tolist() == [0.6524484863740322, 0.9825086362202393, 0.6133400032405981]


@given(
    kept=st.sets(st.integers(0, VOCAB - 1), min_size=1),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    uniform=st.sampled_from([0.0, 5e-324, 2.0**-53, 0.5, ALMOST_ONE - 2.0**-53, ALMOST_ONE]),
    seed=st.integers(0, 100),
)
def test_a_token_of_probability_zero_is_never_chosen(kept: set[int], scale: float, uniform: float, seed: int) -> None:
    scores = torch.full((1, VOCAB), -math.inf)
    scores[0, sorted(kept)] = torch.randn(len(kept), generator=torch.Generator().manual_seed(seed)) * scale
    token, logprob, valid = inverse_cdf(scores, torch.tensor([uniform], dtype=torch.float64))
    assert valid.item()
    assert logprob.item() == pytest.approx(torch.log_softmax(scores.double(), -1)[0, int(token)].item(), abs=1e-4)
    assert torch.softmax(scores, -1)[0, int(token)] > 0


def test_the_ends_of_the_unit_interval_choose_the_first_and_the_last_possible_token() -> None:
    scores = torch.tensor([[-math.inf, 0.0, 1.0, 2.0, -math.inf]])
    ends = torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)
    assert inverse_cdf(scores.expand(2, -1), ends)[0].tolist() == [1, 3]


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 700, 1024])
@pytest.mark.parametrize("possible", [1.0, 0.02])
def test_summing_by_blocks_chooses_what_one_sum_chooses(vocab: int, possible: float) -> None:
    random = torch.Generator().manual_seed(vocab)
    scores = torch.randn(400, vocab, generator=random) * 3
    scores.masked_fill_(torch.rand(400, vocab, generator=random) > possible, -math.inf)
    scores[:, vocab // 2] = 0.0
    uniform = torch.rand(400, generator=random, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, ALMOST_ONE])
    token, logprob, valid = inverse_cdf(scores, uniform)
    cumulative = torch.softmax(scores, -1).double().cumsum(-1)
    target = torch.minimum(uniform * cumulative[:, -1], torch.nextafter(cumulative[:, -1], torch.zeros(1).double()))
    expected = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    assert valid.all()
    assert token.tolist() == expected.tolist()
    exact = scores.double().log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprob.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [Sampling(), Sampling(temperature=0.6, top_k=5), Sampling(top_p=0.8)])
def test_frequencies_are_the_processed_probabilities(row: Sampling) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 20_000
    draws = [Draw(row, seed=7, position=position) for position in range(count)]
    expected = torch.softmax(process(logits.unsqueeze(0), draws[:1])[0].double(), -1) * count
    tokens = torch.tensor(draw(logits.expand(count, -1), draws).token_ids)
    observed = torch.bincount(tokens, minlength=8).double()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    statistic = float(((observed - expected)[possible] ** 2 / expected[possible]).sum())
    degrees = int(possible.sum()) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_greedy_rows_take_the_maximum_among_sampled_ones() -> None:
    logits = torch.randn(3, VOCAB)
    greedy = Draw(Sampling(temperature=0.0, top_k=3), 0, 0, processed_logprob=True, raw_logprob=True)
    drawn = draw(logits, [greedy, Draw(Sampling(), 5, 0), greedy])
    assert drawn.token_ids[::2] == logits[::2].argmax(-1).tolist()
    assert drawn.processed_logprobs == [0.0, None, 0.0]
    assert drawn.raw_logprobs[0] == pytest.approx(float(logits[0].log_softmax(-1).max()))
    assert draw(logits[:1], [greedy]).token_ids == drawn.token_ids[:1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_whose_logits_are_not_finite_are_marked(temperature: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = math.nan
    logits[2] = -math.inf
    drawn = draw(logits, [Draw(Sampling(temperature=temperature), 0, 0)] * 3)
    assert drawn.valid == [True, False, False]
    assert all(0 <= token < VOCAB for token in drawn.token_ids)
