"""The verbs check and inspect: rows looked at, findings as numbers, in the terminal and as pages."""
