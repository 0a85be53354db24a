"""The activations that an SAE is measured on, and the other readings of the same texts.

From a model: the block before and behind, and the texts with BOS added or taken away, can be read.
From a store: what it holds. Texts are drawn in a fixed random order until there are enough rows, so
that a file sorted by topic is no bias.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int

from saefty.diagnosis.base import Rows
from saefty.diagnosis.causes import OUTLIER, READ
from saefty.errors import InputError, NumericError
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import DEFAULT_TOKEN_BUDGET, plan_batches
from saefty.records import ROLES, Example, Site
from saefty.stores.activations import ActivationStore

log = logging.getLogger(__name__)


@runtime_checkable
class Readings(Protocol):
    """Where rows come from; it reads when it is asked."""

    facts: dict[str, Any]
    """What was read, for the report."""

    def others(self) -> list[str]:
        """Return the readings that can be had beside the one asked for."""
        ...

    def __getitem__(self, key: str) -> Rows:
        """Return the rows of a reading."""
        ...


def outliers(rows: Rows) -> Bool[np.ndarray, "rows"]:
    """Return which rows have a norm above `OUTLIER` medians."""
    norms = rows.norms.numpy()
    return np.asarray(norms > OUTLIER * np.median(norms))


def neighbours(site: Site, layers: Sequence[int]) -> Iterator[tuple[str, Site]]:
    """Yield the readings of the blocks before and behind that there are."""
    for step in (-1, 1):
        if site.layer + step in layers:
            yield f"layer_{site.layer + step}/{step:+d}", Site(site.layer + step, site.part)


@dataclass(frozen=True)
class Tokens:
    """What a store says of each row's token, beside its activation."""

    token_id: Int[np.ndarray, "rows"]
    token_pos: Int[np.ndarray, "rows"]
    role: Int[np.ndarray, "rows"]

    def only(self, keep: Bool[np.ndarray, "rows"]) -> "Tokens":
        """Return some of the rows."""
        return Tokens(self.token_id[keep], self.token_pos[keep], self.role[keep])


class StoreReadings:
    """Rows of an activation store.

    Args:
        store: The store.
        site: Where the SAE reads.
        n_rows: Read about this many rows, whole texts at a time.
        keep: The rows to read, all of them; None draws texts.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        n_rows: int,
        keep: Bool[np.ndarray, "rows"] | None = None,
    ) -> None:
        self._store, self._site = store, site
        table = store.rows()
        if keep is None:
            counts = np.bincount(table["example"])
            chosen = _draw([int(n) for n in counts], n_rows)
            keep = np.isin(table["example"], chosen)
        self._indices = np.flatnonzero(keep)
        columns = ("token_id", "token_pos", "role")
        self.tokens = Tokens(*(table[name][self._indices] for name in columns))
        example = table["example"][self._indices]
        _, first, text = np.unique(example, return_index=True, return_inverse=True)
        self._text, self._place = text.astype(np.int64), np.arange(len(text)) - first[text]
        at_front = np.unique(table["token_pos"][self._indices][first], return_counts=True)
        self.facts = {
            "store": str(store.folder),
            "model": store.manifest.get("model_name"),
            "dtype": store.dtype,
            "texts": len(first),
            "first_token_pos": {str(pos): int(n) for pos, n in zip(*at_front, strict=True)},
        }

    def others(self) -> list[str]:
        """Return the neighbouring blocks that the store holds."""
        near = neighbours(self._site, self._store.layers)
        return [key for key, site in near if self._store.site(site.layer) == site]

    def __getitem__(self, key: str) -> Rows:
        """Return rows from the store."""
        layer = self._site.layer
        if key != READ:
            layer = int(key.removeprefix("layer_").split("/")[0])
        return Rows(self._store.take(layer, self._indices), self._text, self._place)


class ModelReadings:
    """Rows of texts that a model reads.

    Args:
        model: The model.
        examples: The texts.
        site: Where the SAE reads.
        n_rows: Read about this many rows, whole texts at a time; None reads every text, in order.

    Raises:
        InputError: If no text has a token to read.
    """

    def __init__(
        self, model: ModelAdapter, examples: Sequence[Example], site: Site, n_rows: int | None
    ) -> None:
        self._model, self._site = model, site
        items = [item for item in model.tokenize(examples, truncate="right") if item.status == "ok"]
        if not items:
            raise InputError(
                f"none of the {len(examples)} texts has a token that {model.name} can read.",
                then="Check that --text names a column with text.",
            )
        self._bos = find_bos(model)
        self._leading = [self._count_bos(item) for item in items]
        kept = [int(self._kept(item).sum()) for item in items]
        chosen = _draw(kept, n_rows) if n_rows else [i for i, n in enumerate(kept) if n]
        self._items = [items[i] for i in sorted(chosen)]
        self._leading = [self._leading[i] for i in sorted(chosen)]
        self._cache: dict[str, Rows] = {}
        self.facts = {
            "model": model.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "texts": len(self._items),
            "leading_bos": {str(n): self._leading.count(n) for n in sorted(set(self._leading))},
            "bos_id": self._bos,
        }

    def others(self) -> list[str]:
        """Return the neighbouring blocks and the readings with BOS added or taken away."""
        near = neighbours(self._site, range(self._model.n_layers))
        return [*(key for key, _ in near), *self._bos_keys()]

    def __getitem__(self, key: str) -> Rows:
        """Read the texts; the three blocks of one reading in one forward pass."""
        if key not in self._cache:
            if key.startswith("bos_"):
                self._cache[key] = self._read([self._site], key)[self._site]
            else:
                near = dict(neighbours(self._site, range(self._model.n_layers)))
                wanted = {READ: self._site, **near}
                rows = self._read(list(wanted.values()), READ)
                self._cache.update({name: rows[site] for name, site in wanted.items()})
        return self._cache[key]

    def _bos_keys(self) -> list[str]:
        if self._bos is None:
            return []
        found = []
        if min(self._leading) == 0:
            found.append("bos_added")
        if max(self._leading) > 1:
            found.append("bos_once")
        if max(self._leading) > 0:
            found.append("bos_removed")
        if min(self._leading) == max(self._leading) == 1:
            found.append("bos_twice")
        return found

    def _wanted_bos(self, key: str, n: int) -> int:
        return {"bos_added": max(n, 1), "bos_once": min(n, 1), "bos_removed": 0, "bos_twice": 2}[
            key
        ]

    def _count_bos(self, item: TokenizedExample) -> int:
        if self._bos is None:
            return 0
        return int(np.argmin(np.append(item.ids == self._bos, False)))

    def _kept(self, item: TokenizedExample) -> Bool[np.ndarray, "tokens"]:
        kept = ~item.special & (item.roles != ROLES.index("image"))
        kept[: self._count_bos(item)] = False  # also where the tokenizer does not call it special
        return kept

    def _with_bos(self, item: TokenizedExample, key: str) -> TokenizedExample:
        """Return an example with as many leading BOS as a reading wants."""
        held = self._count_bos(item)
        wanted = held if key == READ else self._wanted_bos(key, held)
        if wanted == held:
            return item
        ids = np.concatenate([np.full(wanted, self._bos), item.ids[held:]]).astype(item.ids.dtype)
        special = np.concatenate([np.ones(wanted, bool), item.special[held:]])
        role = np.full(wanted, ROLES.index("special"), item.roles.dtype)
        none = np.zeros((wanted, 2), item.offsets.dtype)
        start = item.response_start
        longest = self._model.max_length
        return dataclasses.replace(
            item,
            ids=ids[:longest],
            offsets=np.concatenate([none, item.offsets[held:]])[:longest],
            roles=np.concatenate([role, item.roles[held:]])[:longest],
            special=special[:longest],
            response_start=None if start is None else min(start + wanted - held, longest - 1),
        )

    def _read(self, sites: Sequence[Site], key: str) -> dict[Site, Rows]:
        items = [self._with_bos(item, key) for item in self._items]
        kept = [self._kept(item) for item in items]
        parts: list[dict[Site, torch.Tensor]] = [{} for _ in items]
        for batch_items in plan_batches([len(item.ids) for item in items], DEFAULT_TOKEN_BUDGET):
            batch = self._model.collate([items[i] for i in batch_items])
            rows = torch.zeros_like(batch.mask)
            for line, i in enumerate(batch_items):
                rows[line, : len(kept[i])] = torch.from_numpy(kept[i]).to(rows.device)
            with torch.no_grad():
                captured = self._model.capture(batch, sites, rows=rows)
            counts = [int(kept[i].sum()) for i in batch_items]
            for site, x in captured.items():
                for i, part in zip(batch_items, x.cpu().float().split(counts), strict=True):
                    parts[i][site] = part
        counts = [int(mask.sum()) for mask in kept]
        text = np.repeat(np.arange(len(items)), counts)
        place = np.concatenate([np.arange(n) for n in counts])
        found = {}
        for site in sites:
            x = torch.cat([part[site] for part in parts])
            bad = int((~torch.isfinite(x)).any(dim=1).sum())
            if bad:
                raise NumericError(
                    f"{bad} of {len(x)} activations at {site} are NaN or infinite.",
                    then="Set --dtype bfloat16 or float32 if the model overflows in float16.",
                )
            found[site] = Rows(x, text, place)
        return found


def find_bos(model: ModelAdapter) -> int | None:
    """Return the id of BOS: the tokenizer's, else the one that the model's settings name."""
    own = model.tokenizer.bos_token_id
    if own is not None:
        return int(own)
    config = getattr(getattr(model, "model", None), "config", None)
    named = getattr(config, "bos_token_id", None)
    if isinstance(named, int) and 0 <= named < len(model.tokenizer):
        return named
    return None


def _draw(rows: Sequence[int], n_rows: int) -> list[int]:
    """Return texts in a fixed random order until they have enough rows."""
    order = np.random.default_rng(0).permutation(len(rows))
    order = order[np.asarray(rows)[order] > 0]
    enough = int(np.searchsorted(np.cumsum(np.asarray(rows)[order]), n_rows)) + 1
    return sorted(int(i) for i in order[:enough])
