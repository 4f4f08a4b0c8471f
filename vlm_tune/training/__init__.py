"""A training run. Start with `run`."""
