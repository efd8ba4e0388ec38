"""Which key rates what."""

from __future__ import annotations

from reward_server.human.rules import Scale

_KEYS = "1234567890"


def rating_keys(scale: Scale) -> list[str]:
    """The key of each choice, "" for one that has none.

    Small whole numbers are their own keys, and 0 is 10 where it is not 0. Other choices are counted from the left.
    """
    values = [choice.value for choice in scale.choices]
    if all(value >= 0 and value.is_integer() for value in values):
        keys = {float(key): key for key in "123456789"}
        keys[0.0 if 0.0 in values else 10.0] = "0"
        return [keys.get(value, "") for value in values]
    return [_KEYS[index : index + 1] for index in range(len(values))]
