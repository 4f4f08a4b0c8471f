"""Data sets: a file as examples, its index, and mixtures of several."""
