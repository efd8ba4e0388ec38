"""Learning: one PPO step on one batch of rollouts."""
