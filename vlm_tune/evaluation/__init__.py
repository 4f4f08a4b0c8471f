"""What a model has learned: answers to held-out questions, scored."""
