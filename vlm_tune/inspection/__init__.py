"""The verbs `check` and `inspect`: examine rows and report the findings as numbers, in the terminal and as pages."""
