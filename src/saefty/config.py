"""What a person writes: one closed, frozen model a command, read from YAML and KEY=VALUE words.

Precedence: defaults, then the YAML file, then the words of the command line. Values are read as
YAML, then coerced by the schema (so that `1e-3`, which YAML 1.1 reads as text, becomes a number).
All problems are reported at once, each with its dotted key and, for a misspelt key, the nearest
one.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from saefty.errors import ConfigError
from saefty.registry import nearest

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 20


class Config(BaseModel):
    """Base of every section and every command's configuration."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    ALIASES: ClassVar[dict[str, str]] = {}
    """Other spellings of keys: dotted alias -> dotted key, relative to this model."""


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Build a configuration from defaults, a YAML file and KEY=VALUE words, in that order.

    Args:
        cls: The command's configuration class.
        path: A YAML file, or None for the defaults alone.
        overrides: Words such as `sae.k=32` or `extract.layers=[0,2,4]`.

    Raises:
        ConfigError: If the file or a word cannot be read, or any key or value is refused; the
            message lists every problem.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(path)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{word!r} is not of the form KEY=VALUE.",
                then="Write for example sae.k=32, without spaces around the equals sign.",
            )
        _place(tree, key, parse_yaml(value, f"the value of {key}"), word)
    return build_config(cls, tree)


def build_config(cls: type[C], tree: Mapping[str, Any]) -> C:
    """Validate a nested mapping, with aliases resolved.

    Raises:
        ConfigError: If any key or value is refused; the message lists every problem.
    """
    plain: dict[str, Any] = {}
    _merge(plain, tree)
    for alias, key in all_aliases(cls).items():
        _rename(plain, alias, key)
    try:
        return cls.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(cls, error))) from None


def config_tree(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as plain JSON values."""
    return config.model_dump(mode="json")


def known_keys(cls: type[Config], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration class, sections left out."""
    for name, field in cls.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Config):
            yield from known_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def all_aliases(cls: type[Config], prefix: str = "") -> dict[str, str]:
    """Return the aliases of a class and of all its sections, as full dotted keys."""
    found = {f"{prefix}{alias}": f"{prefix}{key}" for alias, key in cls.ALIASES.items()}
    for name, field in cls.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Config):
            found.update(all_aliases(section, f"{prefix}{name}."))
    return found


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "key: old -> new" for every leaf in which two resolved configurations differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


class _SafeLoader(yaml.SafeLoader):
    """YAML without anchors: an alias bomb of 300 bytes would unfold into millions of nodes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not used in configurations")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_YAML_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str, what: str) -> Any:
    """Read one YAML document with the safe loader.

    Raises:
        ConfigError: If the text is not YAML, too large or too deep.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{what} holds {len(text)} characters; a configuration has at most {MAX_YAML_BYTES}."
        )
    try:
        return yaml.load(text, Loader=_SafeLoader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, but holds a {type(tree).__name__}.")
    return tree


def _place(tree: dict[str, Any], key: str, value: Any, word: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{word!r}: {section} already has the value {inner!r}.")
        tree = inner
    tree[last] = value


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            inner = into.setdefault(str(key), {})
            if isinstance(inner, dict):
                _merge(inner, value)
                continue
        into[str(key)] = value


def _rename(tree: dict[str, Any], alias: str, key: str) -> None:
    *sections, last = alias.split(".")
    holder: Any = tree
    for section in sections:
        holder = holder.get(section) if isinstance(holder, dict) else None
    if isinstance(holder, dict) and last in holder:
        value = holder.pop(last)
        target = dict(_leaves(tree))
        if key in target and target[key] != value:
            raise ConfigError(
                f"{alias} is another word for {key}, but they are set to {value!r} and "
                f"{target[key]!r}. Set one of them."
            )
        _place(tree, key, value, alias)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problems(cls: type[Config], error: ValidationError) -> Iterator[str]:
    keys = [*known_keys(cls), *all_aliases(cls)]
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: no such key in {cls.__name__}.{_nearest_key(key, keys)}"
        elif problem["type"] == "missing":
            yield f"{key}: required, but not given"
        else:
            got = f", got {problem['input']!r}" if problem["type"] != "value_error" else ""
            yield f"{key or cls.__name__}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _nearest_key(key: str, keys: list[str]) -> str:
    """Prefer the nearest key of the same section; then of any (a key put in the wrong section)."""
    section = key.rpartition(".")[0]
    parents = {other.rpartition(".")[0] for other in keys} - {""}
    keys = [*keys, *sorted(parents)]
    beside = [other for other in keys if other.rpartition(".")[0] == section]
    return nearest(key, beside) or nearest(key, keys)
