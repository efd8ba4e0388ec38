"""Prompts: reading, encoding, and an order that a resumed run repeats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import make_byte_tokenizer
from trainer.run.prompts import Cursor, DropReason, PromptDataError, PromptSource, Record, encode, load_records

TOKENIZER = make_byte_tokenizer()


def write_jsonl(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def source_of(texts: list[str], *, seed: int = 0, max_prompt_tokens: int = 100) -> PromptSource:
    records = [Record(row, text) for row, text in enumerate(texts)]
    return PromptSource(records, TOKENIZER, seed=seed, max_prompt_tokens=max_prompt_tokens)


def test_other_columns_become_metadata_strings_as_they_are_and_other_values_as_json(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "data.jsonl", {"prompt": "a", "label": "good", "stars": 4, "tags": ["x", "ü"], "note": None}
    )

    (record,) = load_records(source, column="prompt")

    assert record.prompt == "a"
    assert record.metadata == {"label": "good", "stars": "4", "tags": '["x", "ü"]'}
    assert record.json_keys == {"stars", "tags"}


def test_a_column_that_is_json_in_one_row_is_json_in_every_row(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", {"prompt": "a", "answer": "four"}, {"prompt": "b", "answer": 4})

    first, second = load_records(source, column="prompt")

    assert first.json_keys == second.json_keys == {"answer"}
    assert [json.loads(record.metadata["answer"]) for record in (first, second)] == ["four", 4]


def test_cells_of_a_csv_file_are_strings(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('\ufefftext,stars\n"one, two",4\n', encoding="utf-8")

    (record,) = load_records(str(file), column="text")

    assert (record.prompt, record.metadata, record.json_keys) == ("one, two", {"stars": "4"}, frozenset())


def test_a_parquet_file_reads_like_the_same_rows_in_jsonl(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [{"prompt": "a", "stars": 4, "note": None}, {"prompt": "b", "stars": 2, "note": "x"}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "data.parquet")

    from_parquet = load_records(str(tmp_path / "data.parquet"), column="prompt")

    assert from_parquet == load_records(write_jsonl(tmp_path / "data.jsonl", *rows), column="prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n', "no column 'prompt'.*'text'"),
        ('{"prompt": 3}\n', "row 0: 'prompt' must be text or a list of messages"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ("\n", "no rows"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")

    with pytest.raises(PromptDataError, match=message):
        load_records(str(file), column="prompt")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(PromptDataError, match="No such file"):
        load_records(str(tmp_path / "absent.jsonl"), column="prompt")


def test_a_chat_is_rendered_by_the_template_ready_for_the_assistant() -> None:
    prompt = encode(Record(0, [{"role": "user", "content": "Hi"}]), TOKENIZER)

    assert prompt.text == "user: Hi\nassistant: "
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert prompt.messages == [{"role": "user", "content": "Hi"}]


def test_empty_and_too_long_prompts_are_drawn_with_the_reason_and_do_not_count() -> None:
    source = source_of(["", "long" * 10, "fine", "good"], max_prompt_tokens=8)

    draws, cursor = source.draw(Cursor(), 2)

    assert [draw.dropped for draw in draws].count(None) == 2
    assert {draw.prompt.text: draw.dropped for draw in draws if draw.dropped} == {
        text: reason
        for text, reason in (("", DropReason.EMPTY_PROMPT), ("long" * 10, DropReason.PROMPT_TOO_LONG))
        if text in {draw.prompt.text for draw in draws}
    }
    assert cursor != Cursor()


def test_data_without_a_usable_prompt_is_an_error() -> None:
    with pytest.raises(PromptDataError, match="none of the 2 prompts"):
        source_of(["", "too long"], max_prompt_tokens=3).draw(Cursor(), 1)


@given(st.integers(1, 7), st.integers(0, 3), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_each_pass_hands_out_every_prompt_once_and_a_resumed_run_the_same_ones(
    rows: int, seed: int, counts: list[int]
) -> None:
    texts = [str(row) for row in range(rows)]
    cursor, seen = Cursor(), []
    for count in counts:
        # A new source each time: the cursor is all that a checkpoint keeps.
        draws, cursor = source_of(texts, seed=seed).draw(cursor, count)
        seen += draws

    whole, end = source_of(texts, seed=seed).draw(Cursor(), sum(counts))

    assert [draw.at for draw in seen] == [draw.at for draw in whole]
    assert [draw.prompt.text for draw in seen] == [draw.prompt.text for draw in whole]
    assert end == cursor
    per_pass = Counter((draw.at.epoch, draw.prompt.text) for draw in seen)
    assert set(per_pass.values()) == {1}


def test_passes_differ_in_order() -> None:
    source = source_of([str(row) for row in range(50)])

    draws, _ = source.draw(Cursor(), 100)

    first, second = ([draw.prompt.text for draw in draws[start : start + 50]] for start in (0, 50))
    assert sorted(first) == sorted(second)
    assert first != second
