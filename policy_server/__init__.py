"""The policy server: generates, scores log-probabilities and takes live weight updates."""
