"""Statistics of a pair of tokenizers: which tokens have a small tokenisation bias."""
