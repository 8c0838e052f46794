"""Documents and conversations as tokens: templates, families, special tokens."""
