"""The reward server: turns (prompt, completion) into a reward.

A reward author needs only these two names, and only when a plain list of numbers is not enough.
"""

from reward_server.results import RetryLater, Reward

__all__ = ["RetryLater", "Reward"]
