"""From the user's rows to batches: sample (1), tiles (2), encode (3), batch (4)."""
