"""Callbacks around the steps: progress, sample answers, checkpoints, metrics, and failures."""
