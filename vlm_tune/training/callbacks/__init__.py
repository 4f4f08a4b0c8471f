"""What happens around the steps: progress, sample answers, checkpoints, the report."""
