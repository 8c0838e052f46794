"""Configurations: dataclasses, YAML files and flags. Nothing here imports torch."""

from tokenkit.config.command_line import parse_command_line
from tokenkit.config.errors import EXIT_CONFIG, EXIT_DATA, EXIT_NUMERICS, ConfigError
from tokenkit.config.read import read_config, to_dict, to_yaml
from tokenkit.config.train import ALIASES, TrainConfig

__all__ = [
    "ALIASES",
    "EXIT_CONFIG",
    "EXIT_DATA",
    "EXIT_NUMERICS",
    "ConfigError",
    "TrainConfig",
    "parse_command_line",
    "read_config",
    "to_dict",
    "to_yaml",
]
