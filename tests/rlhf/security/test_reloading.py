"""Files are read again when they change, and broken ones change nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.metrics import CREDENTIALS_BROKEN, CREDENTIALS_RELOADS
from rlhf.security import reloading
from rlhf.security.config import CredentialsError
from rlhf.security.reloading import Reloaded
from tests.support.certificates import replace, swap_link


@pytest.fixture(autouse=True)
def _look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "LOOK_EVERY_SECONDS", 0.0)


def text_of(file: Path, what: str = "thing") -> Reloaded[str]:
    def load() -> tuple[str, Sequence[Path]]:
        text = file.read_text()
        if "broken" in text:
            raise CredentialsError("it is broken")
        return text, [file]

    return Reloaded(what, load)


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    text = text_of(file)
    assert text.current() == "one"
    replace(file, b"two")
    assert text.current() == "two"


def test_a_link_that_was_swapped_is_followed_as_kubernetes_swaps_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name)
    data = tmp_path / "..data"
    data.symlink_to(tmp_path / "one", target_is_directory=True)
    (tmp_path / "token").symlink_to(Path("..data") / "token")
    text = text_of(tmp_path / "token")
    assert text.current() == "one"
    swap_link(data, tmp_path / "two")
    assert text.current() == "two"


def test_a_broken_new_file_leaves_the_old_in_force_says_so_once_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    text = text_of(file, "breaking thing")
    failed = CREDENTIALS_RELOADS.labels("breaking thing", "failed")
    with caplog.at_level(logging.ERROR):
        replace(file, b"broken")
        assert [text.current(), text.current()] == ["one", "one"]
    assert len([record for record in caplog.records if "can't be used, the old stays" in record.message]) == 1
    assert failed._value.get() == 1
    assert CREDENTIALS_BROKEN.labels("breaking thing")._value.get() == 1

    replace(file, b"two")
    assert text.current() == "two"
    assert CREDENTIALS_BROKEN.labels("breaking thing")._value.get() == 0


def test_a_file_that_vanishes_leaves_the_old_in_force(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    text = text_of(file)
    file.unlink()
    assert text.current() == "one"
    file.write_text("two")
    assert text.current() == "two"


def test_files_that_change_while_they_are_read_are_read_once_more(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("1")
    key.write_text("1")
    change_key_in_between = False

    def load() -> tuple[tuple[str, str], Sequence[Path]]:
        first = cert.read_text()
        if change_key_in_between:
            replace(key, b"22")
        return (first, key.read_text()), [cert, key]

    pair = Reloaded("pair", load)
    change_key_in_between = True
    replace(cert, b"2")
    assert pair.current() == ("1", "1")
    change_key_in_between = False
    assert pair.current() == ("2", "22")


def test_a_file_that_is_missing_at_the_start_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=r"absent: No such file"):
        text_of(tmp_path / "absent")


def test_what_changes_while_it_is_read_for_the_first_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    changes = iter([b"two", b"three"])

    def load() -> tuple[str, Sequence[Path]]:
        text = file.read_text()
        if (new := next(changes, None)) is not None:
            replace(file, new)
        return text, [file]

    text = Reloaded("changing thing", load)
    assert text.current() == "three"


def test_a_change_after_other_files_came_into_play_is_seen(tmp_path: Path) -> None:
    index, files = tmp_path / "index", [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(f"{file.name} old")
    index.write_text("a")
    changes = {"b": b"b new"}

    def load() -> tuple[str, Sequence[Path]]:
        file = tmp_path / index.read_text()
        text = file.read_text()
        if (new := changes.pop(file.name, None)) is not None:
            replace(file, new)
        return text, [index, file]

    text = Reloaded("moving thing", load)
    assert text.current() == "a old"
    replace(index, b"b")
    text.current()
    assert text.current() == "b new"
