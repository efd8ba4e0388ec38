from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from demo import corpus
from demo.corpus import CorpusError, Review, extract_snippets, load_reviews, parse_reviews

SNIPPETS = "movieReviewSnippets_GroundTruth.txt"


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_the_snippets_are_found_in_the_archive_within_the_archive() -> None:
    inner = archive_of({"hutto_ICWSM_2014/other.txt": b"no", f"hutto_ICWSM_2014/{SNIPPETS}": b"1\t0.5\tFine."})
    outer = archive_of({"package-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    assert extract_snippets(outer) == b"1\t0.5\tFine."


def test_an_archive_without_the_snippets_is_refused() -> None:
    with pytest.raises(CorpusError, match=SNIPPETS):
        extract_snippets(archive_of({"package-1/readme.txt": b""}))
    with pytest.raises(CorpusError, match=SNIPPETS):
        extract_snippets(b"not an archive")


def test_lines_become_reviews_whatever_their_bytes() -> None:
    content = "1\t2.5\tA  café,\tgood \r\n2\t-1\t\u2026dull\x85 film\r\n\r\n".encode() + b"3\t0\t\xff odd"
    assert parse_reviews(content) == [
        Review(1, 2.5, "A café, good"),
        Review(2, -1.0, "\u2026dull film"),
        Review(3, 0.0, "\ufffd odd"),
    ]


@pytest.mark.parametrize("line", [b"one\t2\ttext", b"1\tgood\ttext", b"1\t2"])
def test_a_line_of_another_shape_is_named(line: bytes) -> None:
    with pytest.raises(CorpusError, match="line 2"):
        parse_reviews(b"1\t0\tfine\n" + line)


def test_the_cache_is_used_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SNIPPETS).write_bytes(b"1\t0\tFine.")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert load_reviews(tmp_path) == [Review(1, 0.0, "Fine.")]


def test_a_failed_download_says_so_and_caches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-folder-here @ file:///no/such/place.tar.gz --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.setattr(corpus, "REQUIREMENTS", requirements)
    with pytest.raises(CorpusError, match="pip could not fetch"):
        load_reviews(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_archive_is_pinned_by_hash() -> None:
    assert re.search(r"^vaderSentiment==3\.3\.2 --hash=sha256:[0-9a-f]{64}$", corpus.REQUIREMENTS.read_text(), re.M)
