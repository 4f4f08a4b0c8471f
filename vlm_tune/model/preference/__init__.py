"""Preference tuning: the loss of pairs of answers, and what the reference says of them."""
