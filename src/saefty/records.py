"""The values that travel between floors: an example, a place in a model, a stretch of tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saefty.errors import ConfigError

PARTS = ("resid_pre", "post_attn_resid", "post_attn_ln", "resid_post", "attn_out", "mlp_out")
ROLES = ("system", "user", "assistant", "response", "image", "special", "padding")

_PART_SPELLINGS = {
    **{part: part for part in PARTS},
    "post_mlp": "resid_post",
    "resid_mid": "post_attn_resid",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "mlp": "mlp_out",
    "": "resid_post",
}
_SITE_FORMS = (
    re.compile(r"blocks\.(\d+)\.(?:hook_)?(\w+)"),
    re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)(?:\.(?:hook_)?(\w+))?"),
    re.compile(r"(\d+)(?:\.(?:hook_)?(\w+))?"),
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One item of a dataset.

    `prompt` is what the model is given, `response` an answer that is teacher-forced after it, and
    `messages` a whole conversation instead of the two. With `raw` the text is tokenised as it
    stands; otherwise the tokenizer's chat template is applied where it has one. `label` is True for
    harmful, False for harmless, None where it is not known. Examples of one `group` (the same
    prompt, say) are never separated by a split. `category` names what an example is about or which
    kind of harm it does, such as a cluster of the dataset; `source` is where it comes from. `span`
    names tokens [start, end) of it, BOS counted as 0, for `pooling.name=span_mean`.
    """

    id: str
    prompt: str
    response: str | None = None
    messages: tuple[Message, ...] | None = None
    image: str | None = None
    label: bool | None = None
    group: str | None = None
    source: str = "local"
    raw: bool = False
    category: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a block, counted from 0, and what is read there."""

    layer: int
    part: str = "resid_post"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"a site's part is one of {', '.join(PARTS)}, not {self.part!r}")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read a site in our spelling, TransformerLens's or Hugging Face's.

        Raises:
            ConfigError: If the text is none of them.

        Example:
            >>> Site.parse("blocks.20.hook_resid_post")
            Site(layer=20, part='resid_post')
            >>> Site.parse("model.layers.3.mlp")
            Site(layer=3, part='mlp_out')
        """
        for form in _SITE_FORMS:
            match = form.fullmatch(text.strip())
            if match:
                part = _PART_SPELLINGS.get(match.group(2) or "")
                if part:
                    return cls(int(match.group(1)), part)
        raise ConfigError(
            f"{text!r} names no place in a model. Write for example 20, 20.mlp_out, layers.20 or "
            f"blocks.20.hook_resid_post; the parts are {', '.join(PARTS)}."
        )

    @property
    def name(self) -> str:
        """The TransformerLens spelling, which other tools read too."""
        return f"blocks.{self.layer}.hook_{self.part}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) that play one role."""

    start: int
    end: int
    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a span's role is one of {', '.join(ROLES)}, not {self.role!r}")


def as_examples(prompts: Sequence[Example | str]) -> list[Example]:
    """Return prompts as examples; of one that is text alone, the id is its place."""
    return [
        Example(id=str(place), prompt=one) if isinstance(one, str) else one
        for place, one in enumerate(prompts)
    ]


def example_record(example: Example) -> dict[str, Any]:
    """Return an example as JSON values.

    An example without a category or a span is written as before there were any, so that the
    checksum of a dataset stays what earlier runs recorded.
    """
    turns = example.messages
    category = {} if example.category is None else {"category": example.category}
    span = {} if example.span is None else {"span": list(example.span)}
    return {
        "example_id": example.id,
        "prompt": example.prompt,
        "response": example.response,
        "messages": None if turns is None else [[turn.role, turn.content] for turn in turns],
        "image": example.image,
        "label": example.label,
        "group": example.group,
        "source": example.source,
        "raw": example.raw,
        **category,
        **span,
    }


def example_from(record: Mapping[str, Any]) -> Example:
    """Return the example that `example_record` wrote."""
    turns, span = record["messages"], record.get("span")
    return Example(
        id=record["example_id"],
        prompt=record["prompt"],
        response=record["response"],
        messages=None if turns is None else tuple(Message(*turn) for turn in turns),
        image=record["image"],
        label=record["label"],
        group=record["group"],
        source=record["source"],
        raw=record["raw"],
        category=record.get("category"),
        span=None if span is None else (span[0], span[1]),
    )
