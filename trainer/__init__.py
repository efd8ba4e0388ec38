"""The trainer: owns the policy weights and runs PPO over gRPC."""
