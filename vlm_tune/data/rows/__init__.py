"""Containers of rows: text, tables and archives, read one row at a time. Start with `rows`."""
