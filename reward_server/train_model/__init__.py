"""Train a reward model on texts that people rated; `python -m reward_server.train_model` is its command."""

from reward_server.train_model.ratings import Rated, TrainingDataError, read_ratings, split
from reward_server.train_model.training import Recipe, Report, train_reward_model

__all__ = ["Rated", "Recipe", "Report", "TrainingDataError", "read_ratings", "split", "train_reward_model"]
