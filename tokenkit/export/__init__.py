"""Trained students in formats that other programs read."""
