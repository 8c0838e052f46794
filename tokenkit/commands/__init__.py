"""The doors beside training: `tokenkit align`, `zett`, `pair-stats` and their relatives."""
