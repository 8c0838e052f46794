"""Models that stop at hidden states and hand over their head."""
