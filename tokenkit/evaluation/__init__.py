"""What a model is worth: bits per byte on text that it was not trained on."""
