"""The trainer: one module that FSDP2 shards, one step, one loop."""
