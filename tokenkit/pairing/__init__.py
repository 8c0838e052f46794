"""Two tokenizations of one text: which tokens say the same thing, and pictures of it."""
