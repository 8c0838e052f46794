"""What would stop a training, or quietly spoil it, found before it is started: `tokenkit doctor`."""
