"""What a run's folder holds: its lock, checkpoints, metrics, and how they are read again."""
