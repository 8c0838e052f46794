"""From data sets to batches: `options.py`, `rows.py`, `mix.py`, `collate.py`, `batches.py`."""
