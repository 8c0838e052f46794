"""The tiny transfer of tests/training, for faults of whole runs."""

from tests.training.conftest import make_config, workspace

__all__ = ["make_config", "workspace"]
