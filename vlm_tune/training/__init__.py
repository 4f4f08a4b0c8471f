"""A training run: `run` is its table of contents."""
