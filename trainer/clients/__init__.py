"""The trainer's ends of the wire: what it asks of a policy server and of a reward server."""
