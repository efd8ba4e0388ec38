"""Engines: what runs the policy and its frozen reference."""
