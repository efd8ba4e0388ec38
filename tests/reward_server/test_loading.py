from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reward_server.kinds.loading import RewardLoadError, load_function
from tests.reward_server.conftest import EXAMPLES


def test_a_function_of_a_file_is_loaded_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_reward.py").write_text("VALUE = 4.0\n")
    file = tmp_path / "my_reward.py"
    file.write_text(
        "from neighbour_of_reward import VALUE\n\ndef mine(completions, **_):\n    return [VALUE] * len(completions)\n"
    )
    loaded = load_function(f"{file}:mine", {})
    assert loaded.name == "mine"
    assert loaded.call(completions=["a"]) == [4.0]


def test_the_version_changes_with_the_source_and_with_the_options(tmp_path: Path) -> None:
    file = tmp_path / "versioned.py"
    file.write_text("def mine(completions, scale=1.0):\n    return [scale] * len(completions)\n")
    first = load_function(f"{file}:mine", {}).version
    assert load_function(f"{file}:mine", {}).version == first
    assert load_function(f"{file}:mine", {"scale": 2.0}).version != first
    file.write_text("def mine(completions, scale=2.0):\n    return [scale] * len(completions)\n")
    assert load_function(f"{file}:mine", {}).version != first


def test_parameters_become_columns_unless_they_are_options_or_have_defaults() -> None:
    assert load_function(f"{EXAMPLES}:with_column", {}).required_columns == ("weight",)
    assert load_function(f"{EXAMPLES}:with_column", {"weight": [2.0]}).required_columns == ()


def test_a_class_is_made_once_with_its_options() -> None:
    loaded = load_function(f"{EXAMPLES}:Scaled", {"scale": 3.0})
    assert loaded.call(completions=["a", "b"]) == [3.0, 3.0]
    assert loaded.required_columns == ()


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("vadar", {}, "Did you mean 'vader'"),
        ("lengths", {}, "Did you mean 'length'"),
        ("nothing_like_it", {}, "module:function"),
        (":f", {}, "module:function"),
        ("no_such_module_here:f", {}, "cannot be imported"),
        ("no/such/file.py:f", {}, "there is no file"),
        (f"{EXAMPLES}:lenghts", {}, "did you mean 'lengths'"),
        (f"{EXAMPLES}:NOT_A_FUNCTION", {}, "not a function"),
        (f"{EXAMPLES}:no_completions", {}, "completions"),
        (f"{EXAMPLES}:positional_only", {}, "positional-only"),
        (f"{EXAMPLES}:lengths", {"scale": 1}, "no option 'scale'"),
        (f"{EXAMPLES}:with_column", {"bonsu": 1}, "did you mean 'bonus'"),
        (f"{EXAMPLES}:record", {"prompts": []}, "no option 'prompts'"),
        ("regex", {}, "pattern"),
        ("regex", {"pattern": "("}, "not a regular expression"),
        ("regex", {"patern": "x"}, "did you mean 'pattern'"),
        ("length", {}, "target"),
        ("length", {"target": 0}, "greater than 0"),
        ("length", {"target": 5, "unit": "miles"}, "unit"),
        ("vader", {"text": "prompt"}, "text"),
    ],
)
def test_what_cannot_be_loaded_is_explained(spec: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RewardLoadError) as refused:
        load_function(spec, options)
    assert says in str(refused.value)


def test_a_file_that_fails_when_imported_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "broken_reward.py"
    file.write_text("1 / 0\n")
    with pytest.raises(RewardLoadError, match="ZeroDivisionError"):
        load_function(f"{file}:mine", {})
