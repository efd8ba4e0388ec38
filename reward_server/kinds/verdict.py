"""Reading a judge's answer: one score in the form that was asked for, or nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any


class UnreadableVerdictError(Exception):
    """The answer holds no score, more than one, or one that is off the scale; the message says which, for the judge."""


def read_score(answer: str, *, lowest: float, highest: float, pattern: re.Pattern[str] | None = None) -> float:
    """The score that `answer` gives, from `lowest` to `highest`. Raises UnreadableVerdictError.

    Without a pattern the answer holds exactly one JSON object with a number under "score", in any other text. With
    one, the pattern matches exactly once, and its group is the number.
    """
    score = _from_json(answer) if pattern is None else _from_pattern(answer, pattern)
    if not lowest <= score <= highest:
        raise UnreadableVerdictError(f"the score {score:g} is not between {lowest:g} and {highest:g}")
    return score


def _from_json(answer: str) -> float:
    verdicts = [found for found in _objects(answer) if "score" in found]
    if len(verdicts) != 1:
        raise UnreadableVerdictError(f'it holds {len(verdicts)} JSON objects with a "score", not one')
    score = verdicts[0]["score"]
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise UnreadableVerdictError('the "score" is not a number')
    return _finite(score)


def _from_pattern(answer: str, pattern: re.Pattern[str]) -> float:
    found = [match.group(1) for match in pattern.finditer(answer)]
    if len(found) != 1:
        raise UnreadableVerdictError(f"it holds {len(found)} scores, not one")
    try:
        return _finite(float(found[0] or ""))
    except ValueError:
        raise UnreadableVerdictError(f"{found[0]!r} is not a number") from None


def _finite(score: float) -> float:
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UnreadableVerdictError(f"the score is {number}")
    return number


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in `text`, one after the other."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # What stands within an object that breaks off is not outermost.
            end = max(start + 1, error.pos)
        except RecursionError:
            return
        else:
            yield found
        start = text.find("{", end)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise UnreadableVerdictError("a JSON object in it names something twice")
    return dict(pairs)
