"""TRL's quickstart: PPOTrainer over the same learner, in one process or through a policy server."""
