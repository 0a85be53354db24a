"""steer generate: what a model replies, plain and steered, without a run to resume."""

import io
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from saefty import fsio
from saefty.config import Config, build_config
from saefty.data.base import DataSection
from saefty.errors import ConfigError
from saefty.interventions.steer import UNIT_WORDS, steer, step_of
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example
from saefty.runs import RunSection, run_folder
from saefty.sae_ts.scale import residual_norm
from saefty.stages.base import open_data, open_model
from saefty.steering import check_places, check_prompts
from saefty.steering_inputs import Given
from saefty.steering_settings import VectorSection

log = logging.getLogger(__name__)

SHOWN = 10
"""Prompts that a terminal shows, at most."""
NEGLIGIBLE = 0.02
"""Mean residual norms below which what is added hardly changes a reply."""
EMPTY = "(empty reply)"
"""What stands for a reply that ended before its first word."""
LEAST_WIDTH = 24
"""Characters of a column below which replies stand one under the other."""


class GenerateSection(VectorSection):
    """With which vector, how strongly, and how replies are drawn."""

    alphas: tuple[float, ...] = ()
    """How strongly; a reply for each."""

    method: Literal[1, 2] = 1
    """1 adds the vector; 2 adds it and brings the activations back to their norm."""

    max_new_tokens: int = Field(default=64, gt=0)
    """Longest reply, in tokens."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""

    seed: int = Field(default=0, ge=0)
    """Of sampling; plain and steered replies draw the same numbers."""

    batch_size: int = Field(default=32, gt=0)
    """Replies that are generated together."""

    raw: bool = False
    """Continue the texts as they stand, without a chat template."""


class GenerateConfig(Config):
    """Configuration of `saefty steer generate`."""

    model: str | None = None
    """Which model to steer; None takes the one that the vector was made on."""

    dtype: str = "auto"
    """Number format of the model."""

    device: str = "auto"
    """Where the model runs."""

    prompts: tuple[str, ...] = ()
    """What to reply to."""

    data: DataSection | None = None
    """A file of prompts in the place of `prompts`."""

    steer: GenerateSection
    """With which vector, how strongly, and how replies are drawn."""


def replies(cfg: GenerateConfig, *, model: ModelAdapter | None = None) -> dict[str, Any]:
    """Return plain and steered replies to every prompt.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads it.

    Raises:
        ConfigError: If there is no alpha, both or neither of prompts and a file, or no token at the
            places to act at.
        InputError: If a prompt is empty or longer than the context.
        SaeftyError: As the loaders of vector, model and data.
    """
    settings = cfg.steer
    if not settings.alphas:
        raise ConfigError(
            "there is no alpha to steer with.",
            then="Give one: --unit residual --alpha 0.5 adds half of what activations are long.",
        )
    if bool(cfg.prompts) == (cfg.data is not None):
        both = "are both given" if cfg.prompts else "are both missing"
        raise ConfigError(
            f"prompts as words and a file of them {both}.",
            then='Write the prompt behind the options, "How do I bake bread?", or --data FILE.',
        )
    if cfg.data is not None:
        prompts = open_data(cfg.data, None)
    else:
        prompts = [Example(str(n), text, raw=settings.raw) for n, text in enumerate(cfg.prompts)]
    check_prompts(prompts)
    given = Given(settings)
    chosen = None if cfg.model is None else ModelSection(name=cfg.model)
    name = given.model_section(chosen, how="Name the model: --model FOLDER.").name
    section = build_config(ModelSection, {"name": name, "dtype": cfg.dtype, "device": cfg.device})
    model = model or open_model(section, [given.vector.site])
    check_places(
        settings.where, model, prompts, settings.max_new_tokens, skip=settings.skip_special
    )
    vector = given.fitted(model, prompts)
    residual = residual_norm(model, vector.site, prompts)
    lengths = [
        alpha * float(step_of(vector, settings.unit).norm()) / residual for alpha in settings.alphas
    ]
    for alpha, length in zip(settings.alphas, lengths, strict=True):
        if 0 < abs(length) < NEGLIGIBLE:
            log.warning(
                "alpha = %g adds %.2g of the mean residual norm, which hardly changes anything; "
                "--unit residual counts in such norms, and 0.3 to 1 is usual", alpha, length,
            )  # fmt: skip
    drawn: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }
    plain = model.generate(prompts, **drawn)
    asked = [prompt for prompt in prompts for _ in settings.alphas]
    edit = steer(
        vector,
        list(settings.alphas) * len(prompts),
        method=settings.method,
        unit=settings.unit,
        where=settings.where,
        skip_special=settings.skip_special,
    )
    with model.intervene(vector.site, edit):
        steered = model.generate(asked, **drawn)
    count = len(settings.alphas)
    return {
        "model": model.name,
        "vector": vector.method,
        "site": vector.site.name,
        "method": settings.method,
        "unit": settings.unit,
        "norms": dict(vector.norms),
        "alphas": list(settings.alphas),
        "residual": residual,
        "residual_norms": lengths,
        "replies": [
            {
                "prompt": prompt.prompt,
                "plain": plain[n],
                "steered": steered[n * count : (n + 1) * count],
            }
            for n, prompt in enumerate(prompts)
        ],
    }


def check_file(path: Path | None) -> None:
    """Refuse a file for the replies that is there already, before there are any.

    Raises:
        ConfigError: If it is.
    """
    if path is not None and path.exists():
        raise ConfigError(
            f"{path} is there already, and replies would be written over it.",
            then="Give another --out, or move it away.",
        )


def keep(found: Mapping[str, Any], path: Path | None) -> Path | None:
    """Write replies to a file, a line a prompt; return where, None if all are shown anyway.

    Args:
        found: What `replies` returned.
        path: The file; None makes one below `artifacts` where there are more than are shown.

    Raises:
        DiskError: If it cannot be written.
    """
    if path is None:
        if len(found["replies"]) <= SHOWN:
            return None
        path = run_folder(RunSection(), "steer_generate") / "replies.jsonl"
    facts = {key: value for key, value in found.items() if key != "replies"}
    lines = [fsio.dump_json_line({**one, **facts}) for one in found["replies"]]
    fsio.commit_text(path, "".join(lines))
    return path


def shown(found: Mapping[str, Any], width: int | None = None, kept: Path | None = None) -> str:
    """Return replies as text: plain and steered in columns, where they have room.

    Args:
        found: What `replies` returned.
        width: Characters in a line; None takes the terminal's.
        kept: Where all of them were written; without, all are shown.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = width or shutil.get_terminal_size((100, 24)).columns
    pairs = zip(found["alphas"], found["residual_norms"], strict=True)
    names = ["plain", *(f"alpha = {alpha:g} ({length:.2g} norms)" for alpha, length in pairs)]
    unit = UNIT_WORDS[found["unit"]]
    if found["unit"] == "latent":
        unit += f" ({found['norms']['latent']:.4g})"
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    head = (
        f"{found['model']}: {found['vector']} vector at {found['site']}, method "
        f"{found['method']}, alpha {unit}; the mean residual norm is {found['residual']:.4g}, "
        "measured on these prompts"
    )
    console.print(Text(head))
    for one in found["replies"][: SHOWN if kept else None]:
        console.print(Text(f"\n> {one['prompt']}"))
        texts = [Text(text if text.strip() else EMPTY) for text in (one["plain"], *one["steered"])]
        beside = width // len(names) >= LEAST_WIDTH
        table = Table(box=box.SIMPLE_HEAD, expand=True, show_header=beside)
        if beside:
            for name in names:
                table.add_column(name, ratio=1, overflow="fold")
            table.add_row(*texts)
        else:
            table.add_column(no_wrap=True)
            table.add_column(ratio=1, overflow="fold")
            for name, text in zip(names, texts, strict=True):
                table.add_row(Text(name), text)
        console.print(table)
    if kept:
        hidden = len(found["replies"]) - SHOWN
        console.print(Text(f"\n{hidden} more prompts; all are in {kept}" if hidden > 0 else
                           f"\nAll are in {kept}"))  # fmt: skip
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
