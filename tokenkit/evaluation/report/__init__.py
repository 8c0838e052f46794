"""One page about runs: what they did, what their models are worth, how they were made."""
