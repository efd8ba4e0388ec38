"""The reward server: turns (prompt, completion) into a reward."""
