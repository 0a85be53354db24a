"""A piece of a dataset read through a model: batches by the plan, and what to do when one fails.

A batch that does not fit in memory, or that fails otherwise, is read in halves, and those in halves
again. So the rows of a batch never depend on luck but on the plan and the failure alone, and what
is left at the end is either read, or one example that cannot be read by itself: out of memory stops
the run; any other failure leaves the example out, named and counted. How a piece was read is kept
in its record, and a repair reads it in the same way.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty.engine import Report
from saefty.errors import (
    InputError,
    MismatchError,
    NumericError,
    ResourceError,
    SaeftyError,
)
from saefty.matmul import products
from saefty.models.base import ModelAdapter, TokenBatch, TokenizedExample
from saefty.models.contrast import capture_contrast
from saefty.models.contrast_check import check_contrast
from saefty.models.selfcheck import check_unlisted
from saefty.piece_rows import PieceRows, row_table
from saefty.reading import Reading, ReadingSection, computed_part, kept_tokens
from saefty.records import Site
from saefty.stores.activations import RowTable

log = logging.getLogger(__name__)

SHOWN_IDS = 5
CHECKED_EXAMPLES = 2  # of the first batch, in the check of a contrast
ZERO_ROWS = 0.01  # share of rows without a contrast that are passed over in silence
Batch = tuple[int, ...]
"""Indices of the examples that share a forward pass."""


@dataclass(frozen=True)
class PieceTask:
    """One piece of the plan: all that is needed to read it, and small."""

    index: int
    batches: tuple[Batch, ...]
    planned: tuple[Batch, ...]
    """The batches of the plan; `batches` differ from them where reading failed."""
    items: Mapping[int, TokenizedExample]
    failed: Mapping[int, str] = field(default_factory=dict)
    """Examples that are left out, and why."""
    max_failed: int = 1
    """Examples of the whole run that may fail."""

    def narrowed(self, batch: Batch, how: str) -> "PieceTask":
        """Return the task without what brought its process down: in halves, or left out.

        Raises:
            InputError: If too many examples have failed.
        """
        if len(batch) > 1:
            half = len(batch) // 2
            parts: tuple[Batch, ...] = (batch[:half], batch[half:])
            failed = dict(self.failed)
        else:
            parts = ()
            failed = {**self.failed, batch[0]: f"the process that read it ended ({how})"}
            check_failed(self.names(failed), self.max_failed)
        at = self.batches.index(batch)
        batches = self.batches[:at] + parts + self.batches[at + 1 :]
        return replace(self, batches=batches, failed=failed)

    def names(self, failed: Mapping[int, str]) -> dict[str, str]:
        """Return why examples failed, by their ids."""
        return {self.items[i].example.id: reason for i, reason in failed.items()}


@dataclass(frozen=True)
class Piece:
    """One piece, read: its rows in dataset order, on the CPU."""

    index: int
    rows: RowTable
    activations: Mapping[Site, Float[Tensor, "rows d_model"]]
    masked: Mapping[str, int]
    """Rows dropped because they were not finite, for each layer in which they were not."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why examples could not be read, by id."""
    batches: tuple[Batch, ...] | None = None
    """The batches as they were read, where that is not the plan's way."""

    def counts(self) -> dict[str, Any]:
        """Return what the piece's record says beside its rows."""
        counts: dict[str, Any] = {"masked": dict(self.masked)}
        if self.batches is not None:
            counts["failed"] = dict(self.failed)
            counts["batches"] = [list(batch) for batch in self.batches]
        return counts


class PieceReader:
    """Reads pieces through a model.

    Args:
        model: The model.
        sites: Where to read, each once.
        section: How to read.
    """

    def __init__(self, model: ModelAdapter, sites: Sequence[Site], section: ReadingSection) -> None:
        self._model, self._sites, self._section = model, sites, section
        self._contrast = section.contrast if section.contrast.method != "none" else None
        self._checked, self._contrast_checked = False, False

    def read(self, task: PieceTask, report: Report) -> Piece:
        """Read one piece.

        Raises:
            NumericError: If an activation is not finite and `nonfinite` is `stop`.
            ResourceError: If one example alone does not fit in memory.
            InputError: If more examples fail than may.
            MismatchError: If the model is of a family that is not listed and its blocks are
                misread, or a contrast has no effect.
            SaeftyError: What the model raises on purpose.
        """
        parts = PieceRows(task.items, self._sites, self._section, self._model)
        waiting = list(reversed(task.batches))
        as_read: list[Batch] = []
        failed = dict(task.failed)
        while waiting:
            batch = waiting.pop()
            report.begin(batch)
            try:
                self._read(batch, task.items, parts)
            except SaeftyError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it is isolated and counted
                waiting += self._after(error, batch, task, failed)
                continue
            as_read.append(batch)
            report.advance(sum(len(self._computed(task.items[i]).ids) for i in batch))
        report.begin(None)
        piece = self._assemble(task, parts)
        if self._contrast is not None and not self._checked:
            self._refuse_zeros(piece)
        if not self._checked and parts.tables and not piece.masked:
            first = [task.items[i] for i in as_read[0][:2]]
            check_unlisted(self._model, self._model.collate(first), self._sites)
            self._checked = True
        changed = tuple(as_read) != task.planned
        return replace(
            piece, failed=task.names(failed), batches=tuple(as_read) if changed else None
        )

    def check(self, reading: Reading) -> None:
        """Check a contrast on the first examples, before there is anything to keep.

        What fails there for another reason is left to the reading, which says whose fault it is.

        Raises:
            SaeftyError: What `check_contrast` raises: the contrast has no effect, or does not
                measure what it says.
        """
        first = reading.plan.pieces[0][0][:CHECKED_EXAMPLES]
        items = reading.items(first)
        try:
            with products():
                self._check_contrast([self._computed(items[i]) for i in first])
        except SaeftyError:
            raise
        except Exception as error:  # noqa: BLE001 - reading the first batch meets it again
            log.debug("the contrast could not be checked: %s", _first_line(error))

    def _check_contrast(self, members: Sequence[TokenizedExample]) -> None:
        if self._contrast is None or self._contrast_checked:
            return
        few = self._model.collate(members[:CHECKED_EXAMPLES], side="right")
        check_contrast(self._model, few, self._sites, self._contrast, self._section.SECTION)
        self._contrast_checked = True

    def _after(
        self, error: Exception, batch: Batch, task: PieceTask, failed: dict[int, str]
    ) -> list[Batch]:
        """Return what is to be read in the place of a batch that failed, last first."""
        memory = _is_out_of_memory(error)
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not memory and type(error).__name__ == "AcceleratorError":
            names = ", ".join(task.items[i].example.id for i in batch[:SHOWN_IDS])
            raise ResourceError(
                f"the device failed while it read examples {names}: {_first_line(error)}. What it "
                "computes after that cannot be trusted.",
                safe="The pieces before this one are committed.",
                then="Run the same command again; if it fails at the same examples, leave them out "
                "or set model.device=cpu, with run.dir on a new folder.",
            ) from error
        if len(batch) > 1:
            half = len(batch) // 2
            log.warning(
                "%s with %d examples in a forward pass; they are read in halves",
                "out of memory" if memory else _first_line(error), len(batch),
            )  # fmt: skip
            return [batch[half:], batch[:half]]
        name = task.items[batch[0]].example.id
        if memory:
            raise ResourceError(
                f"example {name} alone ({len(task.items[batch[0]].ids)} tokens) does not fit in "
                f"memory: {_first_line(error)}",
                safe="The pieces before this one are committed.",
                then="Free memory or use a larger device and run the same command again; or set "
                f"{self._section.SECTION}.truncate or data.limit, with run.dir on a new folder.",
            ) from error
        log.warning("example %s is left out: %s", name, _first_line(error))
        failed[batch[0]] = _first_line(error)
        check_failed(task.names(failed), task.max_failed)
        return []

    def _read(self, batch: Batch, items: Mapping[int, TokenizedExample], parts: PieceRows) -> None:
        """Put the row table and the activations of each example of a batch into their places."""
        pooling = self._section.pooling
        members = [self._computed(items[i]) for i in batch]
        kept = [kept_tokens(item, self._section) for item in members]
        tokens = self._model.collate(members, side="right")
        rows = torch.zeros_like(tokens.mask)
        for place, chosen in enumerate(kept):
            rows[place, : len(chosen)] = torch.from_numpy(chosen).to(rows.device)
        with products():
            captured = self._captured(members, tokens, rows)
        counts = [int(chosen.sum()) for chosen in kept]
        split = {site: x.cpu().split(counts) for site, x in captured.items()}
        for place, i in enumerate(batch):
            x = {site: split[site][place] for site in self._sites}
            if pooling.name != "none":
                x = {site: values.float().mean(0, keepdim=True) for site, values in x.items()}
            parts.put(i, row_table(i, members[place], kept[place], pooling), x)

    def _captured(
        self,
        members: Sequence[TokenizedExample],
        batch: TokenBatch,
        rows: Bool[Tensor, "batch seq"],
    ) -> dict[Site, Tensor]:
        """Return activations or, checked in the first batch, contrasts of chosen tokens."""
        if self._contrast is None:
            batch = replace(batch, reads_padding=not self._is_causal())
            return self._model.capture(batch, self._sites, rows=rows)
        self._check_contrast(members)
        name = self._section.SECTION
        return capture_contrast(self._model, batch, self._sites, rows, self._contrast, name)

    def _is_causal(self) -> bool:
        """Return whether the model is causal; where that cannot be tried, the reading says why."""
        try:
            return self._model.causal
        except MismatchError:
            return False

    def _refuse_zeros(self, piece: Piece) -> None:
        """Refuse a contrast of which nothing is left in the tokens that are kept; warn of a share.

        The check of the first batch looks at all tokens; those before an image cannot see it, nor
        those that are farther behind it than a layer's window reaches.

        Raises:
            MismatchError: If all rows of the first piece are 0 in a layer.
        """
        rows, name = len(piece.rows["example"]), self._section.SECTION
        if self._contrast is None or not rows:
            return
        empty = {site: int((~x.any(dim=1)).sum()) for site, x in piece.activations.items()}
        site, most = max(empty.items(), key=lambda item: item[1])
        said = f"at layer {site.layer} ({site}, {self._contrast.method})"
        if most == rows:
            raise MismatchError(
                f"the intervention had no effect {said}: the contrast is 0 in all {rows} rows of "
                "the first piece.",
                safe="Nothing was kept of them.",
                then=f"Check which tokens are kept ({name}.pooling, {name}.tokens): what lies "
                "before an image, or farther behind it than the layer's attention window, does not "
                "see it there. text_only_mean averages all the text behind it.",
            )
        if most > ZERO_ROWS * rows:
            log.warning(
                "the contrast is 0 in %d of the first %d rows %s, which an SAE would learn with "
                "the rest: text before an image does not see it. %s.pooling.name=text_only_mean "
                "averages the text behind it", most, rows, said, name,
            )  # fmt: skip

    def _computed(self, item: TokenizedExample) -> TokenizedExample:
        return computed_part(item, self._section, self._model)

    def _assemble(
        self,
        task: PieceTask,
        parts: PieceRows,
    ) -> Piece:
        """Return a piece in dataset order; look for NaN and infinity."""
        rows, x, finite = parts.in_order()
        by_layer_ok: dict[int, Bool[np.ndarray, "rows"]] = {}
        for site, ok in finite.items():
            by_layer_ok[site.layer] = ok & by_layer_ok.get(site.layer, np.ones_like(ok))
        masked = Counter(
            {str(layer): int((~ok).sum()) for layer, ok in by_layer_ok.items() if not ok.all()}
        )
        if masked:
            good = np.logical_and.reduce(list(finite.values()))
            bad = sorted({int(i) for i in rows["example"][~good]})
            shown = ", ".join(task.items[i].example.id for i in bad[:SHOWN_IDS])
            where = by_layer(masked)
            if self._section.nonfinite == "stop" and parts.beyond:
                name = self._section.SECTION
                kind = torch.finfo(self._section.rows_dtype(self._model.dtype))
                raise NumericError(
                    f"activations of up to {parts.beyond:,.0f} do not fit into {kind.dtype}, which "
                    f"ends at {kind.max:,.0f} ({where}), first in examples {shown}.",
                    safe="The pieces before this one are committed.",
                    then=f"With run.dir on a new folder, set {name}.dtype=bfloat16 or float32, or "
                    f"{name}.nonfinite=mask to drop such rows and count them.",
                )
            if self._section.nonfinite == "stop":
                raise NumericError(
                    f"activations are NaN or infinite ({where}), first in examples {shown}.",
                    safe="The pieces before this one are committed.",
                    then="With run.dir on a new folder, set model.dtype=bfloat16 or float32 if the "
                    f"model overflows in float16, or {self._section.SECTION}.nonfinite=mask to "
                    "drop such rows and count them.",
                )
            log.warning("dropped rows that are not finite (%s), in examples %s", where, shown)
            rows = {name: column[good] for name, column in rows.items()}
            x = {site: values[torch.from_numpy(good)] for site, values in x.items()}
        return Piece(task.index, rows, x, dict(masked))


def check_failed(failed: Mapping[str, str], allowed: int) -> None:
    """Stop a run in which too many examples fail.

    Args:
        failed: Why each failed, by id.
        allowed: How many may.

    Raises:
        InputError: If more did.
    """
    if len(failed) > allowed:
        shown = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:SHOWN_IDS])
        raise InputError(
            f"{len(failed)} examples failed in the forward pass, and {allowed} may: {shown}",
            safe="The pieces before this one are committed.",
            then="If the model is at fault, mend that; if the examples are, leave them out or let "
            "more fail with engine.max_failed=SHARE. The same command goes on where it stopped.",
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says so; the CPU's and Apple's allocators raise a plain one."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def by_layer(masked: Mapping[str, int]) -> str:
    """Return counts of rows, layer by layer, in words."""
    return ", ".join(f"layer {layer}: {n} rows" for layer, n in masked.items())
