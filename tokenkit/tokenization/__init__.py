"""Any tokenizer as one thing: text to token ids and the byte at which each token ends."""
