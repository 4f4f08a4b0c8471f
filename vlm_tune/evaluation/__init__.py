"""Evaluate a model: score its answers to held-out questions."""
