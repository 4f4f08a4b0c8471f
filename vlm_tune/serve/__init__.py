"""Use a trained model: the terminal chat."""
