"""What a person writes: one closed, frozen model a command, read from YAML and KEY=VALUE words.

Precedence: defaults, then the YAML file, then the words of the command line. Values are read as
YAML, then coerced by the schema: `1e-3`, which YAML 1.1 reads as text, becomes a number, and a word
for a key of text (`run.id=2024-01-31`, `data.label=yes`) is taken as it is written. All problems
are reported at once, each with its dotted key and, for a misspelt key, the nearest one.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

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

    @model_validator(mode="before")
    @classmethod
    def _one_for_a_list_of_one(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        lists = {name for name, field in cls.model_fields.items() if _takes_a_list_only(field)}
        return {
            name: (value,) if name in lists and type(value) in {int, float} else value
            for name, value in given.items()
        }


C = TypeVar("C", bound=Config)


def load_config(
    cls: type[C],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> C:
    """Build a configuration from defaults, a YAML file, words and values, in that order.

    Args:
        cls: The command's configuration class.
        path: A YAML file, or None for the defaults alone.
        overrides: KEY=VALUE words such as `sae.k=32` or `extract.layers=[0,2,4]`.
        values: Values by dotted key that are taken as they are, not read as YAML, such as the
            folder that a flag names.

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
        _place(tree, key, _read_word(cls, key, value), word)
    for key, value in (values or {}).items():
        _place(tree, key, value, f"{key}={value}")
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
        section = section_of(field)
        if section is None:
            yield f"{prefix}{name}"
        else:
            yield from known_keys(section, f"{prefix}{name}.")


def all_aliases(cls: type[Config], prefix: str = "") -> dict[str, str]:
    """Return the aliases of a class and of all its sections, as full dotted keys."""
    found = {f"{prefix}{alias}": f"{prefix}{key}" for alias, key in cls.ALIASES.items()}
    for name, field in cls.model_fields.items():
        section = section_of(field)
        if section is not None:
            found.update(all_aliases(section, f"{prefix}{name}."))
    return found


def section_of(field: FieldInfo) -> type[Config] | None:
    """Return the class of a field that is a section, one that may be left out included."""
    for kind in _alternatives(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Config):
            return kind
    return None


def describe_value(field: FieldInfo) -> str:
    """Return in words what may be written for a key, such as "integer > 0 or null"."""
    signs = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}
    limits = " and ".join(
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for kind, (sign, name) in signs.items()
        if isinstance(limit, kind)
    )
    kinds = [_in_words(kind) for kind in _alternatives(field.annotation)]
    if limits:
        kinds[0] += f" {limits}"
    return " or ".join(kinds)


def _takes_a_list_only(field: FieldInfo) -> bool:
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    return all(get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis for kind in kinds)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _in_words(kind: Any) -> str:
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        *others, last = map(str, inside)
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        many = len(inside) == 2 and inside[1] is Ellipsis
        names = [f"{_in_words(inside[0])}, …"] if many else map(_in_words, inside)
        return f"[{', '.join(names)}]"
    if get_origin(kind) is dict:
        return "{key: " + _in_words(inside[1]) + ", …}"
    words = {
        int: "integer", float: "number", str: "text", bool: "true or false", Path: "path",
        type(None): "null", Any: "value",
    }  # fmt: skip
    return words.get(kind, "{key: value, …}")  # a section within a list


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "key: old -> new" for every leaf in which two resolved configurations differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def as_typed(line: str) -> str:
    """Return a line of `differing_keys` about a run's facts with the key as a user types it."""
    for recorded in ("inputs.model.threads:", "inputs.threads:"):
        line = line.replace(recorded, "engine.threads:")
    for recorded in ("inputs.model.matmul:", "inputs.matmul:"):
        if line.startswith(recorded):  # torch's default is not recorded
            line = line.replace(recorded, "SAEFTY_MATMUL:").replace("None", "'default'")
    return line.removeprefix("config.")


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # of which YAML takes the last, and nobody is told
            raise yaml.YAMLError(f"the key {twice!r} stands there {names.count(twice)} times")
        return super().construct_mapping(node, deep)


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


def _read_word(cls: type[Config], key: str, text: str) -> Any:
    """Return a word's value; for a key of text what is written, where YAML reads something else."""
    value = parse_yaml(text, f"the value of {key}")
    field = _field_of(cls, all_aliases(cls).get(key, key))
    kinds = _alternatives(field.annotation) if field else ()
    if isinstance(value, dict):
        _check_spaces(key, value)
    if value is None or isinstance(value, str | list | dict) or not {str, Path} & {*kinds}:
        return value
    return text


def _check_spaces(key: str, value: Mapping[Any, Any]) -> None:
    """Refuse {limit:30}, which YAML reads as a key called `limit:30` without a value."""
    for name, inner in value.items():
        if inner is None and ":" in str(name):
            option, _, given = str(name).partition(":")
            raise ConfigError(
                f"{key}: {{{name}}} names a key {name!r} without a value.",
                then=f"Write {key}.{option}={given}, or a space after the colon in quotes: "
                f"{key}='{{{option}: {given}}}'.",
            )


def _field_of(cls: type[Config], key: str) -> FieldInfo | None:
    """Return the field of a dotted key, which may be a section; None if there is none."""
    name, _, rest = key.partition(".")
    field = cls.model_fields.get(name)
    if not rest or field is None:
        return field
    section = section_of(field)
    return _field_of(section, rest) if section else field


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"cannot read the configuration {path}: {reason}.",
            then="Set -c to a YAML file; configs/ holds one for each command.",
        ) from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, but holds a {type(tree).__name__}.")
    return tree


def _place(tree: dict[str, Any], key: str, value: Any, word: str) -> None:
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, start=1):
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            name = ".".join(sections[:depth])
            raise ConfigError(
                f"{word!r}: {name} is a section of keys, but it was given the value {inner!r}.",
                then=f"Leave {name}={inner} out.",
            )
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
    said: set[str] = set()
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        # Of a value that may be of two kinds each is reported; the key is said once.
        owner = max((known for known in keys if f"{key}.".startswith(f"{known}.")), default=key)
        if owner in said:
            continue
        said.add(owner)
        if problem["type"] == "extra_forbidden":
            yield f"{key}: no such key.{_nearest_key(key, keys)}"
        elif problem["type"] == "missing":
            yield from (f"{one}: required, but not given" for one in _required(cls, key))
        elif problem["type"] == "value_error":
            yield f"{key}: {problem['msg']}".replace("Value error, ", "").removeprefix(": ")
        else:
            yield _wrong_value(cls, owner, key, problem["input"], keys)


def _required(cls: type[Config], key: str) -> list[str]:
    """Return the key, or the required keys of the section that it is."""
    field = _field_of(cls, key)
    section = section_of(field) if field else None
    if section is None:
        return [key]
    return [f"{key}.{n}" for n, inner in section.model_fields.items() if inner.is_required()]


def _wrong_value(cls: type[Config], owner: str, key: str, given: Any, keys: list[str]) -> str:
    field = _field_of(cls, owner)
    if field is None:
        return f"{key}: got {given!r}, which cannot be used"
    if section_of(field) is not None:
        first = next(name for name in keys if name.startswith(f"{owner}."))
        return f"{owner}: a section of keys, not a value. Set its keys, such as {first}={given}"
    kinds, hint = _alternatives(field.annotation), ""
    if str in kinds and isinstance(given, bool | int | float | date):
        hint = ". Put it in quotes, so that YAML takes it as it is written"
    elif get_origin(kinds[0]) is Literal:
        hint = f".{nearest(str(given), [str(one) for one in get_args(kinds[0])])}"
    place, wanted = owner if len(kinds) > 1 else key, describe_value(field)
    if get_origin(kinds[0]) is dict and key != owner:
        wanted = _in_words(get_args(kinds[0])[1])
    return f"{place}: should be {wanted}, got {given!r}{hint.rstrip('.')}"


def _nearest_key(key: str, keys: list[str]) -> str:
    """Prefer a key put in the wrong section; then the nearest of the same section; then of any."""
    section, _, last = key.rpartition(".")
    elsewhere = [other for other in keys if other.endswith(f".{last}")]
    if len(elsewhere) == 1:
        return f" Did you mean {elsewhere[0]!r}?"
    parents = {other.rpartition(".")[0] for other in keys} - {""}
    keys = [*keys, *sorted(parents)]
    beside = [other for other in keys if other.rpartition(".")[0] == section]
    return nearest(key, beside) or nearest(key, keys)
