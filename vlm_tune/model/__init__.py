"""The model: vision encoder + projector + language model, their loading, their loss and a run's checkpoint."""
