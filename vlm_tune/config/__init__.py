"""The typed configuration: `schema` declares every setting, `parse` turns YAML and command line into it."""
