"""Reading tokenizers from files, and writing them."""
