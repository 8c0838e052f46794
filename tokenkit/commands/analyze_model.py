"""`tokenkit analyze-model`: how many parameters a model has, and how many of them a token meets.

tokenkit analyze-model configs/config.yaml --plot parameters.png --output parameters.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.config.paths import check_model_folder
from tokenkit.errors import ConfigError, blaming_data, names_a_new_file


@dataclass(frozen=True, kw_only=True)
class AnalyzeModelConfig:
    """Count a model's parameters by part, in total and as many as one token meets. No weight is read."""

    model: str
    """A YAML file with a `model_config`, a folder in Hugging Face layout, or a name on the hub."""

    output: str | None = None
    """JSON file that is written beside the table; it must not exist."""

    plot: str | None = None
    """PNG file of the parts; it must not exist."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        path = Path(self.model).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            check_model_folder("model", self.model)
        elif not path.is_file():
            raise FileNotFoundError(f"model: the file {self.model} does not exist")
        for name, value in (("output", self.output), ("plot", self.plot)):
            names_a_new_file(name, value)
        if self.output is not None and self.output.endswith(".png"):
            raise ConfigError(f"output is the JSON file, got {self.output}: name a picture with --plot")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # elsewhere --config is a file of this command's options, of which there are too few for a file
    given = [re.sub(r"^--config(?==|$)", "--model", x) for x in (sys.argv[1:] if argv is None else argv)]
    words = with_positions(given, "model")

    def analyzed() -> None:
        analyze(parse_command_line(AnalyzeModelConfig, words, program="tokenkit analyze-model"))

    return run(analyzed)


def analyze(config: AnalyzeModelConfig) -> None:
    """Print the table; write JSON and picture where they were asked for.

    Raises:
        ConfigError, DataError, FileNotFoundError: a configuration or model that cannot be read.
    """
    from tokenkit.disk import write_durably
    from tokenkit.evaluation.parameters import count_parameters, draw, read_shape, table

    if config.model.endswith((".yaml", ".yml")):
        model = read_shape(config.model)
    else:
        with blaming_data():
            model = read_shape(config.model, trust_remote_code=config.trust_remote_code)
    found = count_parameters(model)
    print(table(found))
    if config.output is not None:
        write_durably(Path(config.output).expanduser(), json.dumps(found, indent=2) + "\n")
    if config.plot is not None:
        write_durably(Path(config.plot).expanduser(), draw(found))


if __name__ == "__main__":
    raise SystemExit(main())
