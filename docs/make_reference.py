"""Write docs/reference/ from the code: commands, keys, names, errors, and the Python interface.

Run it as `make docs` after a key, a name or a docstring has changed; a test compares the pages.
`docs/reference/files.md` is written by hand, and compared by a test with what runs write.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import saefty
from saefty import cli, command, errors
from saefty.catalogue import REGISTRIES
from saefty.config import Config, all_aliases, describe_value, section_of
from saefty.evaluation import LatentEvaluation
from saefty.fsio import commit_text
from saefty.models.base import Intervention, ModelAdapter
from saefty.models.selfcheck import LISTED_FAMILIES

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- Made by `make docs` from the code; edit the docstrings instead. -->\n\n"
SHARED = ("model", "data", "run", "engine")
STAGES = {  # command -> module and class of its configuration
    "extract": "stages.extract.ExtractConfig",
    "train": "stages.train.TrainConfig",
    "encode": "stages.encode.EncodeConfig",
    "annotate": "annotation.settings.AnnotateConfig",
    "tokens": "sentences.TokensConfig",
    "analyze": "stages.analyze.AnalyzeConfig",
    "eval": "stages.eval.EvalConfig",
    "probe": "stages.probe.ProbeConfig",
    "steer sweep": "stages.steer_sweep.SweepConfig",
    "steer effects": "stages.effects.EffectsConfig",
    "steer compare": "stages.steer_compare.CompareConfig",
}
KINDS = {
    "saes": (
        "SAE architectures",
        "`sae.arch`; how to choose: [architectures](../architectures.md)",
    ),
    "formats": ("SAE formats", "`encode.sae`; see [published SAEs](../published-saes.md)"),
    "models": (
        "Kinds of model",
        "chosen by the checkpoint's config.json. Tested [families](../families.md): "
        + ", ".join(sorted(LISTED_FAMILIES)),
    ),
    "datasets": ("Datasets", "`data.name`"),
    "metrics": ("Latent scores", "`eval.ranked_by`, and columns of `layer_<i>.csv`"),
    "judges": ("Judges", "`intervention.judge`, `intervention.fluency`"),
    "plots": ("Plots", "`save_plot(name, data, path)`"),
    "interventions": ("Interventions", "`saefty.gate`, `saefty.steer` and so on, in Python"),
}
GIVEN_BY_THE_STAGE = ("self", "model", "unsteered")
"""Arguments of a judge that `judge_options` does not set."""


def pages() -> dict[str, str]:
    """Return every generated page, by file name."""
    return {
        "commands.md": _commands(),
        "configuration.md": _configuration(),
        "choices.md": _choices(),
        "errors.md": _errors(),
        "python.md": _python(),
    }


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        commit_text(FOLDER / name, text)
        sys.stdout.write(f"{FOLDER / name}\n")


# A table's cell holds one line, in which a bar would end it.
def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(*rows: tuple[str, ...]) -> str:
    """Return a table; a column without a value is left out."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    head, *body = [tuple(row[i] for i in kept) for row in rows]
    lines = [head, tuple("---" for _ in head), *body]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines) + "\n"


def _first_sentence(text: str | None) -> str:
    """Return a docstring's first sentence, which may be wrapped."""
    paragraph = inspect.cleandoc(text or "").split("\n\n")[0]
    match = re.match(r"(.+?[.!?])(?=\s+[A-ZΑ-Ω`\[]|$)", " ".join(paragraph.split()))
    return match.group(1) if match else " ".join(paragraph.split())


# commands


def _commands() -> str:
    root = _command_of(cli.app)
    parts = [
        MADE,
        "# Commands\n\nA stage takes settings as `KEY=VALUE` words; [configuration]"
        "(configuration.md) lists them. Results go to standard output, all else to standard "
        "error.\n\n",
    ]
    for path, leaf in _leaves(root, "saefty"):
        arguments = [p for p in leaf.params if p.param_type_name == "argument"]
        options = [p for p in leaf.params if p.param_type_name == "option"]
        usage = " ".join([path, *(_usage(argument) for argument in arguments)])
        help_text = inspect.cleandoc(leaf.help or "")
        words, _, example = help_text.partition("\n\nExample: ")
        parts.append(f"## {path}\n\n{words}\n\n```text\n{usage} [OPTIONS]\n```\n\n")
        if example:
            parts.append(f"Example: `{example}`\n\n")
        rows = [(f"`{_usage(one)}`", one.help) for one in arguments if one.help]
        rows += [(f"`{', '.join(one.opts)}`", one.help or "") for one in options]
        parts.append(_table(("argument or option", "meaning"), *rows))
    return "".join(parts).rstrip() + "\n"


def _command_of(app: Any) -> Any:
    from typer.main import get_command

    return get_command(app)


def _leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _leaves(inner, f"{path} {name}")


def _usage(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


# configuration


def _configuration() -> str:
    sections: dict[tuple[str, type[Config]], tuple[str, list[str]]] = {}
    aliases: dict[str, list[str]] = {}
    for stage, place in STAGES.items():
        module, _, name = place.rpartition(".")
        root = getattr(importlib.import_module(f"saefty.{module}"), name)
        for path, section, meaning in _sections(root, ""):
            sections.setdefault((path, section), (meaning, []))[1].append(stage)
        for alias, key in all_aliases(root).items():
            aliases.setdefault(key, []).append(alias)
    parts = [
        MADE,
        "# Configuration\n\nA key is set by a word of the command line (`sae.k=32`) or in a YAML "
        "file given by `-c`; words win. Values are read as YAML: `null` is none, lists are "
        "`[0,2]`. What differs from these defaults, and everything else, is written into the "
        "run's `metadata.json`. The files in `configs/` are a start.\n\n",
    ]
    for (path, section), (meaning, stages) in sorted(sections.items(), key=_place_of_section):
        used = ", ".join(f"`saefty {stage}`" for stage in stages)
        parts.append(f"## {path}\n\n{meaning or section.__doc__} Read by {used}.\n\n")
        rows = [_key(f"{path}.{name}", field, aliases) for name, field in _own(section)]
        parts.append(_table(("key", "value", "default", "meaning"), *rows))
    return "".join(parts).rstrip() + "\n"


def _place_of_section(item: tuple[tuple[str, type[Config]], Any]) -> int:
    """Keep the order of the stages, with what all share at the end."""
    top = item[0][0].partition(".")[0]
    return SHARED.index(top) if top in SHARED else -1


def _sections(root: type[Config], prefix: str) -> Iterator[tuple[str, type[Config], str]]:
    """Yield every section below a class that has keys of its own, with what it is for."""
    for name, field in root.model_fields.items():
        section = section_of(field)
        if section is not None:
            if any(True for _ in _own(section)):
                yield f"{prefix}{name}", section, field.description or ""
            yield from _sections(section, f"{prefix}{name}.")


def _own(section: type[Config]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if section_of(field) is None:
            yield name, field


def _key(key: str, field: FieldInfo, aliases: Mapping[str, list[str]]) -> tuple[str, str, str, str]:
    others = sorted(set(aliases.get(key, ())))
    also = f" Also spelt {', '.join(f'`{one}`' for one in others)}." if others else ""
    return f"`{key}`", describe_value(field), _default(field), f"{field.description or ''}{also}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


# names


def _choices() -> str:
    parts = [
        MADE,
        "# Names to choose from\n\n`saefty list KIND` prints them, those of other installed "
        "packages among them; how to add one: [contributing](../../CONTRIBUTING.md).\n\n",
    ]
    for kind in [*KINDS, *sorted(set(REGISTRIES) - set(KINDS))]:
        title, where = KINDS.get(kind, (kind.capitalize(), "see the source"))
        module, attribute = REGISTRIES[kind]
        registry = getattr(importlib.import_module(module), attribute)
        own = [name for name in registry if registry[name].__module__.startswith("saefty.")]
        rows = [
            (f"`{name}`", *(_architecture if kind == "saes" else _entry)(registry[name]))
            for name in own
        ]
        head = ("name", "is", "options", "source" if kind == "saes" else "defined in")
        parts.append(f"## {title}\n\n`saefty list {kind}`; {where}.\n\n{_table(head, *rows)}")
    return "".join(parts).rstrip() + "\n"


def _architecture(entry: Any) -> tuple[str, str, str]:
    module = sys.modules[entry.__module__].__doc__
    options = ", ".join(f"`{name}` {value:g}" for name, value in entry.OPTIONS.items())
    source = re.search(r"Source: (.+?\))", module or "", flags=re.DOTALL)
    return _first_sentence(module), options, source.group(1) if source else ""


def _entry(entry: Any) -> tuple[str, str, str]:
    options = ""
    if inspect.isclass(entry) and hasattr(entry, "score"):
        parameters = inspect.signature(entry).parameters.values()
        names = [one.name for one in parameters if one.name not in GIVEN_BY_THE_STAGE]
        options = ", ".join(f"`{name}`" for name in names)
    return _first_sentence(entry.__doc__), options, f"`{entry.__module__}`"


# errors


def _errors() -> str:
    kinds = [errors.SaeftyError, *_descendants(errors.SaeftyError)]
    rows = [(str(k.exit_code), f"`{k.__name__}`", _first_sentence(k.__doc__)) for k in kinds]
    rows.sort(key=lambda row: int(row[0]))
    text = (
        "# Errors\n\nA message says what is wrong with both values, what is safe, and the next "
        "step. In Python each is an exception of `saefty.errors`, all of them a `SaeftyError`; on "
        "the command line it ends with its exit code, and `--json` prints it as one object on "
        "standard error.\n\n"
    )
    tail = (
        f"{command.INTERRUPTED} means interrupted (Ctrl-C) and {command.TERMINATED} terminated "
        "(SIGTERM): what was committed is safe, and the line that resumes the run is "
        "printed. 1 without one of our messages is a mistake of ours; `--debug` shows where.\n"
    )
    return MADE + text + _table(("exit code", "exception", "means"), *rows) + tail


def _descendants(kind: type[errors.SaeftyError]) -> Iterator[type[errors.SaeftyError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from _descendants(child)


# Python


def _python() -> str:
    parts = [
        MADE,
        "# Python\n\n`import saefty as sf`. Keyword arguments of the stages' functions are the "
        "keys of their section in the [configuration](configuration.md).\n\n",
    ]
    public = {name: getattr(saefty, name) for name in saefty.__all__}
    given_back = {one.__name__: one for one in (ModelAdapter, LatentEvaluation)}
    for name, entry in (public | given_back).items():
        parts.append(f"## {name}\n\n")
        if inspect.isclass(entry) and issubclass(entry, BaseException):
            parts.append(f"{_first_sentence(entry.__doc__)} See [errors](errors.md).\n\n")
            continue
        parts.append(f"```python\n{_signature(name, entry)}\n```\n\n{_description(entry)}\n\n")
        if inspect.isclass(entry):
            rows = [(f"`{attribute}`", text) for attribute, text in _members(entry)]
            parts.append(_table(("has", "which is"), *rows) if rows else "")
    return "".join(parts).rstrip() + "\n"


def _signature(name: str, entry: Any) -> str:
    """Return a signature on one line, or a line an argument where that is too long."""
    signature = inspect.signature(entry)
    parameters, star = [], False
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        mark = {one.VAR_KEYWORD: "**", one.VAR_POSITIONAL: "*"}.get(one.kind, "")
        typed = "" if one.annotation is one.empty else f": {_annotation(one.annotation)}"
        default = "" if one.default is one.empty else f" = {one.default!r}"
        parameters.append(f"{mark}{one.name}{typed}{default}")
    returns = signature.return_annotation
    known = inspect.isfunction(entry) and returns is not signature.empty
    tail = f" -> {_annotation(returns)}" if known else ""
    line = f"{name}({', '.join(parameters)}){tail}"
    if len(line) <= 96:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in parameters) + f"){tail}"


def _annotation(annotation: Any) -> str:
    if annotation is type(None) or annotation is None:
        return "None"
    text = inspect.formatannotation(annotation)
    text = text.replace(inspect.formatannotation(Intervention), "Intervention")
    return re.sub(r"\b(?:saefty|torch|collections|pathlib|typing|jaxtyping)\.(?:\w+\.)*", "", text)


def _description(entry: Any) -> str:
    """Return what a docstring says before its sections, then its arguments as a list."""
    text = inspect.cleandoc(entry.__doc__ or "")
    body, _, rest = text.partition("\nArgs:\n")
    body = re.split(r"\n(?:Returns|Raises|Example|Attributes):\n", body)[0].strip()
    block = re.split(r"\n(?=\S)", rest)[0]
    block = inspect.cleandoc(block) if block.strip() else ""
    found = re.findall(r"^(\**\w+): (.+(?:\n[ ]+.+)*)", block, flags=re.MULTILINE)
    arguments = "".join(f"- `{name}`: {' '.join(words.split())}\n" for name, words in found)
    return f"{body}\n\n{arguments}".strip()


def _members(entry: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties that a class or its bases here define."""
    for name, member in inspect.getmembers_static(entry):
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        ours = str(getattr(inner, "__module__", "")).startswith("saefty.")
        if name.startswith("_") or not ours or not inspect.isfunction(inner):
            continue
        text = _first_sentence(inner.__doc__)
        if text:
            yield name if isinstance(member, property) else f"{name}()", text


if __name__ == "__main__":
    main()
