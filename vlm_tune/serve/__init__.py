"""Use a trained model: in the terminal, on a page, as OpenAI's API; and watch runs."""
