"""A conversation as text: templates, tokens, and the pieces between them."""
