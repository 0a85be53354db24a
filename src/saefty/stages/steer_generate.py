"""steer generate: what a model replies, plain and steered, without a run on disk."""

import io
import shutil
from typing import Any, Literal

from pydantic import Field

from saefty.config import Config, build_config
from saefty.data.base import DataSection
from saefty.errors import ConfigError
from saefty.interventions.steer import UNIT_WORDS, steer
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example
from saefty.stages.base import open_data, open_model
from saefty.steering import check_prompts
from saefty.steering_inputs import Given
from saefty.steering_settings import VectorSection

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
        ConfigError: If there is no alpha, or both or neither of prompts and a file.
        InputError: If a prompt is empty or longer than the context.
        SaeftyError: As the loaders of vector, model and data.
    """
    settings = cfg.steer
    if not settings.alphas:
        raise ConfigError("there is no alpha to steer with.", then="Give one: --alpha 8.")
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
    name = given.model_section(chosen).name
    section = build_config(ModelSection, {"name": name, "dtype": cfg.dtype, "device": cfg.device})
    model = model or open_model(section, [given.vector.site])
    vector = given.fitted(model, prompts)
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
        "replies": [
            {
                "prompt": prompt.prompt,
                "plain": plain[n],
                "steered": steered[n * count : (n + 1) * count],
            }
            for n, prompt in enumerate(prompts)
        ],
    }


def shown(found: dict[str, Any], width: int | None = None) -> str:
    """Return replies as text: plain and steered in columns, where they have room.

    Args:
        found: What `replies` returned.
        width: Characters in a line; None takes the terminal's.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = width or shutil.get_terminal_size((100, 24)).columns
    names = ["plain", *(f"alpha = {alpha:g}" for alpha in found["alphas"])]
    unit = UNIT_WORDS[found["unit"]]
    if found["unit"] == "residual":
        unit += f" ({found['norms']['residual']:.4g}, measured on these prompts)"
    elif found["unit"] == "latent":
        unit += f" ({found['norms']['latent']:.4g})"
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    head = (
        f"{found['model']}: {found['vector']} vector at {found['site']}, method "
        f"{found['method']}, alpha {unit}"
    )
    console.print(Text(head))
    for one in found["replies"]:
        console.print(Text(f"\n> {one['prompt']}"))
        texts = [Text(text) for text in (one["plain"], *one["steered"])]
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
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
