"""tokenkit: move language models across tokenizers, with memory that does not grow with the vocabulary."""

__version__ = "0.1.0"
