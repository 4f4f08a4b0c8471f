"""Data recipes: run one, fetch what it needs. Knows nothing about rows or models."""
