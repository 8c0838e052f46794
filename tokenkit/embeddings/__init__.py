"""Embedding rows for a vocabulary that a model has not seen."""
