"""The dialects of rows: raw record -> Sample. Start with `dialects`."""
