"""The dialects of rows: raw record -> Sample. `dialects` is the door."""
