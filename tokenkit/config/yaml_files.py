"""YAML, read as data: no tags, no duplicate keys, a bounded size, numbers such as 5e-5 as numbers."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenkit.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
"""Nodes after aliases are expanded: a few lines of nested aliases name billions."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2, without its dates, refusing duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class declares it without ClassVar)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping whose keys are text and stand once."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.\d*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one configuration file.

    Raises:
        ConfigError: unreadable, too large, not YAML, not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: that is no configuration")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a configuration.

    Raises:
        ConfigError: with the line and column where it stops being YAML.
    """
    content = load_yaml(text, source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{source} must hold a mapping from field names to values, got {type(content).__name__}"
        )
    return content


def load_yaml(text: str, source: str) -> Any:
    """Parse any YAML value.

    Raises:
        ConfigError: not YAML, a tag, a duplicate key, or too much of it.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MAX_NODES:  # before merge keys are copied out
            raise ConfigError(f"{source} holds more than {MAX_NODES} values once its aliases are expanded")
        content = None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not readable as YAML: {problem}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return content


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes with aliases expanded, each container counted once; a cycle is beyond every limit."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # what a container inside itself costs
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(item, known) for item in inner)
    return known[id(node)]


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write values so that `parse_yaml` reads the same."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """The safe dumper; what our loader would read as a number is quoted, and repeated values have no
    aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value wherever it stands."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote text that holds the line breaks of Unicode, which plain YAML folds into a space."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
