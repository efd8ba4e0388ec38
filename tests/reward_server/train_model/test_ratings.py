"""Tables of rated texts, and their split."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.train_model.ratings import Rated, TrainingDataError, read_ratings, split

TWO = [Rated("good, very", 3.0), Rated("bad", -1.5)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufefftext,rating\n"good, very",3\nbad,-1.5\n'),
        ("a.tsv", "rating\ttext\n3\tgood, very\n-1.5\tbad\n"),
        ("a.jsonl", '{"text": "good, very", "rating": 3}\n\n{"text": "bad", "rating": "-1.5", "by": "ann"}\n'),
    ],
)
def test_a_table_of_text_is_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_ratings(tmp_path / name) == TWO


def test_a_parquet_file_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    table = pa.table({"review": [each.text for each in TWO], "stars": [each.rating for each in TWO]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_ratings(tmp_path / "a.parquet", text="review", rating="stars") == TWO


def test_rows_without_a_text_or_a_rating_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,rating\ngood,\n,2\nbad,-1.5\n")
    assert read_ratings(tmp_path / "a.csv") == [Rated("bad", -1.5)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "one of .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.csv", "text,stars\ngood,3\n", "row 1 has no column 'rating'; it has 'text', 'stars'"),
        ("a.csv", "text,rating\ngood,three\n", "the rating of row 1, 'three', is not a finite number"),
        ("a.csv", "text,rating\ngood,3\nbad,inf\n", "the rating of row 2, 'inf', is not a finite number"),
        ("a.csv", f"text,rating\n{'x' * 200_000},3\n", "cannot be read: field larger than field limit"),
        ("a.csv", "text,rating\ngood,3,but\n", "line 2 has more cells than the header"),
        ("a.jsonl", '{"text": "good", "rating": 3}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", '{"text": 7, "rating": 3}\n', "the text of row 1 is a int"),
        ("a.parquet", "no", "is not a Parquet file"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_place(
    name: str, content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainingDataError, match=says):
        read_ratings(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"nowhere\.csv cannot be read"):
        read_ratings(tmp_path / "nowhere.csv")


RATED = st.lists(st.builds(Rated, st.sampled_from(["a", "A", " a", "b", "c d", "c  D", "e"]), st.just(1.0)))


@given(RATED, st.floats(min_value=0.01, max_value=0.99), st.integers())
def test_a_split_keeps_every_text_once_and_like_ones_together(rated: list[Rated], held_out: float, seed: int) -> None:
    train, others = split(rated, held_out=held_out, seed=seed)
    assert sorted(each.text for each in (*train, *others)) == sorted(each.text for each in rated)
    sides = [{" ".join(each.text.split()).casefold() for each in side} for side in (train, others)]
    assert not sides[0] & sides[1]
    assert (train, others) == split(rated, held_out=held_out, seed=seed)
