"""Public checkpoint layouts <-> the model: one file a layout."""
