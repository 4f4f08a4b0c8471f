"""What a run will need, before it starts: memory, arithmetic and time, counted on tensors without numbers."""
