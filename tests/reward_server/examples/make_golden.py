"""Makes golden/vectors.json: `python -m tests.reward_server.examples.make_golden`.

The rewards are worked out here by the rules of reward_server/examples/README.md, apart from any of the six servers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent / "golden" / "vectors.json"

Vector = dict[str, Any]

TRIMMED = " \t\n\r"
# Each is white space to some language's own trim, or looks like it: none may be trimmed.
KEPT = "\v\f\x00\x1c\x1f\x85\u00a0\u1680\u180e\u2003\u200b\u2028\u202f\u205f\u3000\ufeff"
FULLWIDTH_MARKS = "\uff0e\uff01\uff1f\u3002\u2026"
NOT_JSON = (
    "", " ", "nope", "True", "nul", "nulll", "NaN", "Infinity", "-", "+1", "01", "1.", ".5", "0x10",
    "42 43", '"a"b', '"a', "'a'", '"a\tb"', '"a\nb"', r'"\x41"', r'"\u12"', "[1,", "[1,]", "{", '{"a":1,}', "{a:1}",
    '{"a" 1}', "1 // one", "\u00a042", "\f42", "42\x00", "]",
)  # fmt: skip
# Each with the reference answer that it stands for.
JSON = (
    ('"42"', "42"), ('" 42\\n"', "42"), ('""', ""), ('"null"', "null"), (r'"a\"b"', 'a"b'), (r'"a\\b\/c"', "a\\b/c"),
    (r'"a\n\tb"', "a\n\tb"), (r'"caf\u00e9"', "café"), (r'"\ud83d\ude00"', "😀"), ('"😀"', "😀"), (r'"\u0000"', "\x00"),
    (r'"\u00a042"', "\u00a042"), ("42", "42"), (" \t42\r\n", "42"), ("-0", "-0"), ("1.50", "1.50"), ("1E5", "1E5"),
    ("12345678901234567890", "12345678901234567890"), ("true", "true"), ("false", "false"),
    ("{}", "{}"), ('{"a":  [1, null]}', '{"a":  [1, null]}'), (' ["42"] ', '["42"]'), (r'["\u0034"]', r'["\u0034"]'),
)  # fmt: skip


def reward_of(completion: str, reference: str) -> tuple[float, dict[str, float]]:
    """The reward and its components."""
    text = completion.strip(TRIMMED)
    marked = text != "" and text[-1] in ".!?"
    answer = text[:-1].strip(TRIMMED) if marked else text
    match = 1.0 if answer == reference.strip(TRIMMED) else 0.0
    form = 0.25 if marked else 0.0
    # Not above 64 code points it is -0.0: a test that tells the two zeros apart must expect that one.
    length = -min(1.0, max(0, len(completion) - 64) / 256)
    return (match + form) + length, {"match": match, "format": form, "length": length}


def scored(completion: str, answer: str, *, reference: str | None = None, json_keys: tuple[str, ...] = ()) -> Vector:
    """A sample that is scored; `reference` is what `answer` stands for, itself unless it is JSON."""
    reward, components = reward_of(completion, answer if reference is None else reference)
    return {
        "completion": completion,
        "metadata": {"answer": answer},
        "json_metadata_keys": list(json_keys),
        "outcome": "scored",
        "reward": reward,
        "components": components,
    }


def failed(code: str, metadata: dict[str, str], *json_keys: str) -> Vector:
    """A sample that fails."""
    return {
        "completion": "42.",
        "metadata": metadata,
        "json_metadata_keys": list(json_keys),
        "outcome": "failed",
        "code": code,
    }


def matches() -> Iterator[Vector]:
    """Equal code point by code point, or not."""
    for completion, answer in (
        ("42", "42"), ("42", "43"), ("42", "042"), ("42.0", "42"), ("4 2", "42"), ("The answer is 42", "42"),
        ("Paris", "paris"), ("Paris", "Paris"), ("", ""), ("", "42"), ("42", ""), ("caf\u00e9", "caf\u00e9"),
        ("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "cafe\u0301"), ("\u212b", "\u00c5"), ("\ufb01", "fi"),
        ("😀", "😀"), ("😀", "\ufffd"), ("👩\u200d👧", "👩\u200d👧"), ("\x00", "\x00"), ("4\x002", "4\x002"),
        ("4\x002", "42"), ("4\x002", "4"), ("\ufffd", "\ufffd"), ("a\nb", "a\nb"), ("a\r\nb", "a\nb"),
        ('"42"', "42"), ("null", "null"),
    ):  # fmt: skip
        yield scored(completion, answer)


def marks() -> Iterator[Vector]:
    """Each ending mark, alone and in company; only the last one goes."""
    for mark in ".!?":
        for completion in (f"42{mark}", f" 42 {mark}\n", mark, f"{mark}42", f"42{mark}{mark}"):
            yield scored(completion, "42")
        yield scored(mark, "")
        yield scored(f"42{mark}{mark}", f"42{mark}")
        yield scored(f"42{mark}", f"42{mark}")
    for completion, answer in (
        ("a..", "a."), ("a. .", "a."), ("a?!", "a?"), ("...", ".."), (" . . ", "."), ("3.14.", "3.14"),
        ("3.14", "3.14"), ("\t.", ""), ("a\x00.", "a\x00"), ("a.\x00", "a"), ("😀!", "😀"),
        ("e\u0301?", "e\u0301"), (".\u0301", ""),
    ):  # fmt: skip
        yield scored(completion, answer)
    for mark in FULLWIDTH_MARKS:
        yield scored(f"42{mark}", "42")


def white_space() -> Iterator[Vector]:
    """The four that are trimmed, around the completion and the reference; and all those that are not."""
    for space in TRIMMED:
        yield scored(f"{space}42{space}", "42")
        yield scored("42", f"{space}42{space}{space}")
    yield scored(TRIMMED, TRIMMED[::-1])
    for space in KEPT:
        yield scored(f"42.{space}", "42")
    for space in KEPT[4:8]:
        yield scored(f" {space}42 .", f"{space}42\n")


def lengths() -> Iterator[Vector]:
    """The penalty from its first code point to its limit, in characters of one to four bytes of UTF-8."""
    for count in (2, 63, 64, 65, 66, 80, 128, 191, 255, 256, 257, 319, 320, 321, 322, 1000, 1500):
        yield scored("a" * (count - 1) + ".", "a" * (count - 1))
    for unit, count in itertools.product(("\u00e9", "語", "😀", "e\u0301"), (64, 65, 321)):
        yield scored((unit * count)[:count], "42")
    # White space is cut off for the match, and counts for the length.
    yield scored("42." + " " * 61, "42")
    yield scored("42." + " " * 62, "42")
    yield scored("\n" * 400, "")


def json_answers() -> Iterator[Vector]:
    """JSON strings by their content, other JSON by its text; and plain strings that only look like JSON."""
    for text, reference in JSON:
        yield scored(f"{reference}!", text, reference=reference, json_keys=("answer",))
    yield scored('"42"', '"42"')
    yield scored("null.", "null", json_keys=("other",))
    yield scored("42", '"42"', reference="42", json_keys=("absent", "answer", "answer"))
    yield {**scored("42", "42", json_keys=("row",)), "metadata": {"answer": "42", "row": "[1, {}]"}}
    yield {**scored("42", "42"), "metadata": {"answer": "42", "row": "nope"}}


def failures() -> Iterator[Vector]:
    """No answer, or a column that is not JSON where the call says that it is."""
    yield failed("MISSING_METADATA", {})
    yield failed("MISSING_METADATA", {"Answer": "42", "answers": "42"})
    yield failed("MISSING_METADATA", {}, "answer")
    yield failed("MISSING_METADATA", {"answer": "null"}, "answer")
    yield failed("MISSING_METADATA", {"answer": " null\n"}, "answer")
    for text in NOT_JSON:
        yield failed("INVALID_METADATA", {"answer": text}, "answer")
    yield failed("INVALID_METADATA", {"answer": "42", "row": "nope"}, "row")
    yield failed("INVALID_METADATA", {"answer": '"42"', "row": ""}, "answer", "row")


FAMILIES = (matches, marks, white_space, lengths, json_answers, failures)


def vectors() -> list[Vector]:
    """All of them, each with an id that names its family."""
    return [
        {"id": f"{family.__name__}-{index}", **vector}
        for family in FAMILIES
        for index, vector in enumerate(family(), start=1)
    ]


def render() -> str:
    """The file: one vector a line, in ASCII, so that a reader sees every code point."""
    return "[\n" + ",\n".join(json.dumps(vector) for vector in vectors()) + "\n]\n"


if __name__ == "__main__":
    VECTORS.write_text(render(), encoding="ascii")
    print(f"{len(vectors())} vectors in {VECTORS}")
