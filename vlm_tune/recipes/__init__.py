"""Data recipes: run one, fetch what it needs. Knows nothing of rows or models."""
