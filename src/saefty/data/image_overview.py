"""What a dataset's images are: how many, of which kinds and sizes, and how many cannot be read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from saefty.images import BadImageError, image_facts, load_image
from saefty.log import progress
from saefty.records import Example


@dataclass(frozen=True)
class ImageOverview:
    """The images of a dataset, each file decoded once.

    Attributes:
        examples: Examples of the dataset, with an image or without.
        with_image: Those with an image.
        files: Different files among their images.
        bad: How many examples have an image that cannot be read, by what is wrong with it.
        first_bad: The first such image of each kind.
        formats: Files of each format, by content.
        animated: Files with more than one frame, of which the first is read.
        sizes: Width and height in pixels of every file that can be read, upright.
    """

    examples: int
    with_image: int
    files: int
    bad: dict[str, int]
    first_bad: dict[str, str]
    formats: dict[str, int]
    animated: int
    sizes: Int[np.ndarray, "files 2"]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "ImageOverview | None":
        """Return the overview of some examples; None if none has an image."""
        used = Counter(example.image for example in examples if example.image is not None)
        if not used:
            return None
        bad: Counter[str] = Counter()
        formats: Counter[str] = Counter()
        first_bad: dict[str, str] = {}
        animated, sizes = 0, []
        with progress("images", len(used), "images") as bar:
            for path, times in used.items():
                try:
                    sizes.append(load_image(path).size)
                    facts = image_facts(path)
                except BadImageError as error:
                    bad[error.kind] += times
                    first_bad.setdefault(error.kind, error.place)
                else:
                    formats[facts.format] += 1
                    animated += facts.animated
                bar.advance()
        return cls(
            len(examples),
            used.total(),
            len(used),
            dict(bad.most_common()),
            first_bad,
            dict(formats.most_common()),
            animated,
            np.array(sizes, dtype=np.int64).reshape(-1, 2),
        )

    def as_record(self) -> dict[str, Any]:
        """Return the overview as JSON values."""
        return {
            "with_image": self.with_image,
            "files": self.files,
            "bad": self.bad,
            "first_bad": self.first_bad,
            "formats": self.formats,
            "animated": self.animated,
            "size": self._spread(),
        }

    def text(self) -> str:
        """Return the overview as lines."""
        unread = sum(self.bad.values())
        lines = [
            f"images: {self.with_image:,} of {self.examples:,} examples have one, in "
            f"{self.files:,} files; {unread:,} ({unread / self.with_image:.2%}) cannot be read"
        ]
        lines += [f"- {kind}: {n:,}; first {self.first_bad[kind]}" for kind, n in self.bad.items()]
        kinds = ", ".join(f"{name} {n:,}" for name, n in self.formats.items())
        if kinds:
            first = f"; {self.animated:,} animated, of which the first frame is read"
            lines.append(f"kind by content: {kinds}{first if self.animated else ''}")
        for side, spread in self._spread().items():
            told = ", ".join(f"{name} {n:,.1f}".removesuffix(".0") for name, n in spread.items())
            lines.append(f"{side} in pixels: {told}")
        return "\n".join(lines)

    def _spread(self) -> dict[str, dict[str, float]]:
        """Return least, median and greatest of width and height; nothing without a good image."""
        if not len(self.sizes):
            return {}
        return {
            side: {
                "min": int(values.min()),
                "median": float(np.median(values)),
                "max": int(values.max()),
            }
            for side, values in zip(("width", "height"), self.sizes.T, strict=True)
        }
