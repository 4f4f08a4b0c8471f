"""Containers of rows: text, tables, archives, found and read one at a time. `rows` is the door."""
