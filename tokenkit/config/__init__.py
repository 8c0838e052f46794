"""Configurations: dataclasses, YAML files and flags. Nothing here imports torch."""

from tokenkit.config.command_line import parse_command_line
from tokenkit.config.read import from_dict, read_config, to_dict, to_yaml
from tokenkit.config.train import ALIASES, TrainConfig
from tokenkit.errors import ConfigError, ExitCode

__all__ = [
    "ALIASES",
    "ConfigError",
    "ExitCode",
    "TrainConfig",
    "from_dict",
    "parse_command_line",
    "read_config",
    "to_dict",
    "to_yaml",
]
