"""From data sets to batches: `options.py`, `sources.py`, `mix.py`, `collate.py`, `batches.py`."""
