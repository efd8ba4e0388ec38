"""TRL's sentiment example in small: a language model learns to praise films, through three real processes."""
