"""The configuration of `saefty annotate`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from saefty.config import Config
from saefty.engine import EngineSection
from saefty.models.base import ModelSection
from saefty.reading import ReadingSection
from saefty.runs import RunSection

MODEL = "google/gemma-2-9b-it"
RELEASE = "gemma-scope-9b-pt-res-canonical"
SAE_ID = "layer_20/width_16k/canonical"
LAYER, TOP_K = 20, 50


class AnnotateSection(ReadingSection):
    """Which file, which SAEs, and which tokens."""

    SECTION: ClassVar[str] = "annotate"
    BOS_ENDS_PROMPT: ClassVar[bool] = False

    input: str
    """The file of results: `{"results": [{"variations": [{"prompt", "response"}, …]}, …]}`."""

    sae: tuple[str, ...] | None = None
    """Folders of SAEs (or repositories of the hub), in the place of release and ids."""

    sae_release: str = RELEASE
    """The release that the SAEs belong to: a name that `saefty sae list` shows, a repository of the
    hub, or a folder that holds them."""

    sae_id: tuple[str, ...] | None = None
    """The SAE of each layer in the release; None is `layer_20/width_16k/canonical`."""

    layers: tuple[int, ...] | None = None
    """The block that each SAE reads; None takes what a folder says of itself, and 20 for ids."""

    hook_name: str | None = None
    """Where the SAE reads, if one alone is used; None takes what the SAE says, else
    `blocks.{layer}.hook_resid_post`."""

    tokens: Literal["text", "all", "prompt_end", "response"] = "prompt_end"
    """Whose features are written: `prompt_end` the prompt's last token, `all` every token, BOS
    included; `response` or `text` (no special tokens) as in `encode`."""

    nonfinite: Literal["stop", "mask"] = "mask"
    """What to do when an activation is NaN or infinite: `mask` gives that sample the status error,
    `stop` ends the run."""

    chat: bool = False
    """Apply the tokenizer's chat template to prompt and response; otherwise they are joined as they
    stand, with one BOS in front where the tokenizer has one and the prompt does not spell it."""

    @field_validator("sae", "sae_id", mode="before")
    @classmethod
    def _between_commas(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        whole = Path(given).exists() or "," not in given
        return (given,) if whole else tuple(word.strip() for word in given.split(","))

    @model_validator(mode="after")
    def _goes_together(self) -> "AnnotateSection":
        if self.pooling.name != "none":
            raise ValueError("features are written token by token: leave out annotate.pooling")
        if self.contrast.method != "none":
            raise ValueError("features are of plain activations: leave out annotate.contrast")
        if self.sae is not None and (
            self.sae_id is not None or "sae_release" in self.model_fields_set
        ):
            raise ValueError("give either sae (folders) or sae_release and sae_id, not both")
        names = self.sae or self.sae_id or (SAE_ID,)
        if not all(names):
            raise ValueError("an SAE's name is empty")
        if self.layers is not None and len(self.layers) != len(names):
            raise ValueError(
                f"layers names {len(self.layers)} blocks and there are {len(names)} SAEs; name one "
                "block for each SAE"
            )
        if self.sae is None and self.layers is None and len(names) > 1:
            raise ValueError(f"{len(names)} SAEs are named; say with layers which block each reads")
        if self.hook_name is not None and len(names) > 1:
            raise ValueError("hook_name is for one SAE; of several, each one's own files say it")
        return self


class AnnotateEngineSection(EngineSection):
    """How work is shared out on this machine. Results do not depend on the number of workers."""

    max_failed: float = Field(default=1.0, ge=0, le=1)
    """Share of the samples that may fail in the forward pass (at least one may) before the run
    stops. Those that fail say so in the output; if none is left, the run stops."""


class OutputSection(Config):
    """What is written; other values need nothing to be computed again."""

    path: Path | None = None
    """The annotated file; None puts it beside the input, with the time in its name."""

    top_k: int = Field(default=TOP_K, gt=0)
    """Most features of a token, those with the largest activations."""


class AnnotateConfig(Config):
    """Configuration of `saefty annotate`."""

    model: ModelSection = ModelSection(name=MODEL)
    """The model that gave the responses."""

    annotate: AnnotateSection
    """Which file, which SAEs, and which tokens."""

    output: OutputSection = OutputSection()
    """What is written."""

    engine: AnnotateEngineSection = AnnotateEngineSection()
    """How the work is shared out on this machine."""

    run: RunSection = RunSection()
    """Where the features are kept: by default `artifacts/annotate/<input>-<checksum>`, so that the
    same command goes on where it was stopped."""
