"""The typed configuration: `schema` declares every knob, `parse` turns YAML and command line into it."""
