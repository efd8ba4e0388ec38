"""Rewards that come with the server, by short name. Each is a callable class; its fields are its options."""

from reward_server.builtins.length import LengthReward
from reward_server.builtins.regex import RegexReward
from reward_server.builtins.vader import VaderReward

BUILTINS = {"vader": VaderReward, "length": LengthReward, "regex": RegexReward}

__all__ = ["BUILTINS", "LengthReward", "RegexReward", "VaderReward"]
