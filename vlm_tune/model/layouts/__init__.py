"""Public checkpoint layouts <-> the model: one file per layout."""
