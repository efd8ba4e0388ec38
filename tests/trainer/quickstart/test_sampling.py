"""TRL's generation settings: what is off, what biases the KL, what a server can be asked for."""

from typing import Any

import pytest

from trainer.quickstart.sampling import served_sampling, shaping_settings, switched_off

QUICKSTART: dict[str, Any] = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": 256,
    "max_new_tokens": 20,
}
TRANSFORMERS = {"top_k": 50}


def test_trls_ways_of_saying_off_become_numbers_that_transformers_takes() -> None:
    assert switched_off({"min_length": -1, "top_k": 0.0}) == {"min_length": 0, "top_k": 0}
    assert isinstance(switched_off({"top_k": 0.0})["top_k"], int)


def test_the_quickstarts_settings_shape_nothing() -> None:
    assert shaping_settings(switched_off(QUICKSTART), TRANSFORMERS) == {}


@pytest.mark.parametrize(
    ("changed", "shaping"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": None}, {"top_k": 50}),
        ({"top_p": 0.9, "repetition_penalty": 1.2}, {"top_p": 0.9, "repetition_penalty": 1.2}),
        ({"min_new_tokens": 4, "min_length": 3}, {"min_new_tokens": 4, "min_length": 3}),
        ({"do_sample": False, "top_k": 5, "num_beams": 2}, {"do_sample": False, "num_beams": 2}),
    ],
)
def test_settings_that_sample_from_another_distribution_are_named(
    changed: dict[str, Any], shaping: dict[str, Any]
) -> None:
    settings = {name: value for name, value in {**QUICKSTART, **changed}.items() if value is not None}
    assert shaping_settings(switched_off(settings), TRANSFORMERS) == shaping


def test_the_models_own_generation_settings_count_where_the_call_says_nothing() -> None:
    assert shaping_settings({"do_sample": True, "top_k": 0}, {"temperature": 0.6}) == {"temperature": 0.6}
    assert shaping_settings({"do_sample": True, "temperature": 1.0}, {"temperature": 0.6}) == {}


def test_the_quickstarts_settings_become_a_plain_request() -> None:
    asked = served_sampling(switched_off(QUICKSTART), eos_token_ids=(256,))

    assert (asked.temperature, asked.top_k, asked.top_p) == (1.0, 0, 1.0)
    assert asked.most_new_tokens(prompt_tokens=7) == 20
    assert asked.least_new_tokens(prompt_tokens=7) == 0


def test_no_sampling_is_temperature_zero_as_in_transformers() -> None:
    assert served_sampling({"temperature": 0.7}, eos_token_ids=()).temperature == 0.0


def test_lengths_with_the_prompt_become_lengths_without_it() -> None:
    asked = served_sampling({"max_length": 12, "min_length": 10}, eos_token_ids=())

    assert asked.most_new_tokens(prompt_tokens=5) == 7
    assert asked.least_new_tokens(prompt_tokens=5) == 5
    assert asked.least_new_tokens(prompt_tokens=11) == 0
    with pytest.raises(ValueError, match="max_length is 12"):
        asked.most_new_tokens(prompt_tokens=12)
    assert served_sampling({}, eos_token_ids=()).most_new_tokens(prompt_tokens=5) == 20


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"repetition_penalty": 1.3}, {"stop_strings": ["\n"]}, {"no_such_setting": 1}]
)
def test_what_a_server_cannot_be_asked_for_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        served_sampling(settings, eos_token_ids=())


def test_neutral_values_of_other_settings_are_no_obstacle() -> None:
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "bad_words_ids": None}
    assert served_sampling({"do_sample": True, **neutral}, eos_token_ids=()).temperature == 1.0


def test_another_eos_than_the_served_models_is_refused() -> None:
    assert served_sampling({"eos_token_id": [3, 2]}, eos_token_ids=(2, 3))
    with pytest.raises(ValueError, match="eos_token_id"):
        served_sampling({"eos_token_id": -1}, eos_token_ids=(2, 3))
