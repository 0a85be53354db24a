"""Causal language models of transformers: the families in `selfcheck.py`, and every one like them.

The blocks are found by their number, and the tokenizer decides about templates and special tokens,
so a family needs no code of its own as long as `hooks.find_layout` knows the names of a block's
children. Whether it read them rightly is checked by arithmetic when the model is loaded.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from saefty.errors import MismatchError
from saefty.models.base import MODEL_FAMILIES, Intervention, Positions, TokenBatch
from saefty.models.batching import attended, whole_pass
from saefty.models.chat import with_response
from saefty.models.checkpoint import (
    ModelInfo,
    ModelSection,
    describe,
    load_tokenizer,
    load_weights,
)
from saefty.models.hooks import capturing, place_of
from saefty.models.replies import check_logits, check_prompts, choose, joined, stream
from saefty.models.shared import SharedPrompts
from saefty.records import PARTS, Example, Site, as_examples

log = logging.getLogger(__name__)

BETWEEN = ("post_attn_resid", "post_attn_ln")  # the parts between attention and MLP


@MODEL_FAMILIES.register("decoder")
class Decoder(SharedPrompts):
    """A causal language model.

    Args:
        model: A transformers model with its language-model head.
        tokenizer: Its fast tokenizer.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, info: ModelInfo, provenance: dict[str, Any]
    ) -> None:
        super().__init__(model, tokenizer, info, provenance)
        # What every forward pass calls: OPT's goes past its base model to the decoder within.
        self._stack = next(m for m in model.modules() if self.blocks in set(m.children()))
        self._special_ids = torch.as_tensor(self.text.special_ids, device=self.device)
        self._barred: list[int] = []  # tokens that no reply may hold
        self._takes = set(inspect.signature(model.forward).parameters)
        self._ours = False  # whether a forward pass was started here and told its positions
        # What a pass without a cache that was not started here read, and how much of it was given.
        self._observed: tuple[Tensor, int] | None = None
        self._unreadable = self._check_parts()
        # Tokens of an image may read each other, and in some families those of a prompt.
        self._looks_ahead = hasattr(model.config, "vision_config")

    @staticmethod
    def claims(config: Any) -> bool:
        """Return whether a checkpoint holds a text-only model with a language-model head."""
        if hasattr(config, "vision_config"):
            return False
        if config.model_type == "bert" and not config.is_decoder:
            return False  # transformers has a causal head for BERT too
        names = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if config.model_type not in names and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            registered: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # by another package
            names[config.model_type] = registered.__name__
        if not config.architectures:
            return config.model_type in names
        return config.architectures[0] in names.values()

    @classmethod
    def load(cls, section: ModelSection, info: ModelInfo) -> "Decoder":
        """Read tokenizer and weights from a folder or the hub."""
        tokenizer = load_tokenizer(section)
        model = load_weights(section, transformers.AutoModelForCausalLM)
        return cls(model, tokenizer, info, describe(section, info, model))

    def _read(self, batch: TokenBatch) -> Any:
        positions = whole_pass(batch)
        beside = self._beside(batch, positions)
        mask = attended(batch, looks_ahead=self._looks_ahead)
        return self._forward(batch.ids, mask, positions, use_cache=False, **beside)

    def _beside(self, batch: TokenBatch, positions: Positions) -> dict[str, Any]:
        """Return what a forward pass takes beside tokens, by the model's argument names.

        Args:
            batch: What was given to read.
            positions: The tokens of this pass: those, or what a reply adds to them.
        """
        return dict(batch.inputs) if positions.is_prefill else {}

    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
        """Return the next-token logits at every position, in the model's dtype."""
        return self._read(batch).logits

    def loss(self, batch: TokenBatch) -> Float[Tensor, "batch next"]:
        """Return -log p of each token given those before it; see `ModelAdapter.loss`."""
        logits, targets = self.logits(batch)[:, :-1], batch.ids[:, 1:]
        rows = [  # one by one: float32 logits of a whole batch can be gigabytes
            nn.functional.cross_entropy(row.float(), target, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
        real = batch.mask[:, 1:] & batch.mask[:, :-1]
        return torch.stack(rows).masked_fill(~real, float("nan"))

    @contextmanager
    def intervene(self, site: Site, edit: Intervention) -> Iterator[None]:
        """Edit the activations at a site within the context; see `ModelAdapter.intervene`.

        It holds for every forward pass of the model, also those started by transformers' own
        `generate`. Of these, tokens are known to be generated by the cache that they add to.
        Without one, a pass over what the pass before read and one token more is taken to continue
        it; beams that change places are not known by that, and count as given.

        Raises:
            ConfigError: If the layer is out of range.
            MismatchError: If the family does not have the part.
        """
        if not self._edits:
            _ = self.shares_prompts  # tried before an edit could see it
        self._observed = None
        handle = self._stack.register_forward_pre_hook(self._observe, with_kwargs=True)
        try:
            with super().intervene(site, edit):
                yield
        finally:
            handle.remove()

    def generate(
        self,
        examples: Sequence[Example | str],
        *,
        max_new_tokens: int,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
        cache: bool = True,
    ) -> list[str]:
        """Return the model's reply to each example; see `ModelAdapter.generate`.

        Raises:
            InputError: If a prompt is empty, longer than the context or has no readable image.
            NumericError: If the logits of a row hold NaN or infinity; it names the step.
        """
        given = as_examples(examples)
        distinct = {id(one): one for one in given}  # one object stands for many rows of a grid
        read = self.tokenize([with_response(one, None) for one in distinct.values()])
        check_prompts(read, self.info)
        item_of = dict(zip(distinct, read, strict=True))
        items = [item_of[id(one)] for one in given]
        order = sorted(range(len(items)), key=lambda i: (-len(items[i].ids), i))
        replies = [""] * len(items)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            names = [items[i].example.id for i in chosen]
            own = {name: stream(seed, name) for name in names}
            streams = [own[name] for name in names]
            batch = self.collate([items[i] for i in chosen], side="left")
            rows = torch.tensor(chosen, device=self.device)
            new = self._continue(batch, rows, max_new_tokens, temperature, streams, cache)
            for i, ids in zip(chosen, new, strict=True):
                replies[i] = self.text.decode_reply(items[i], ids)
        return replies

    def _continue(
        self,
        batch: TokenBatch,
        rows: Int[Tensor, "batch"],
        max_new_tokens: int,
        temperature: float,
        streams: Sequence[torch.Generator],
        use_cache: bool,
    ) -> list[list[int]]:
        """Return the new tokens of each row, an end-of-text token left out."""
        stops = self._stop_ids()
        room = [min(max_new_tokens, self.max_length - len(item.ids)) for item in batch.items]
        if min(room) < max_new_tokens:
            log.warning(
                "%d replies may be cut by the context", sum(r < max_new_tokens for r in room)
            )
        replies: list[list[int]] = [[] for _ in room]
        alive = [r > 0 for r in room]
        ids, mask, cache = batch.ids, batch.mask, None
        positions = replace(whole_pass(batch), rows=rows)
        alike = use_cache and any(alive) and self.begins_alike(batch)
        begun = self.begin(batch, positions, max(room)) if alike else None
        while any(alive):
            output = begun or self._forward(
                ids,
                mask,
                positions,
                use_cache=use_cache,
                past_key_values=cache,
                logits_to_keep=1,
                **self._beside(batch, positions),
            )
            begun = None
            cache = getattr(output, "past_key_values", None) if use_cache else None
            if use_cache and cache is None:
                raise MismatchError(
                    f"{self.name} ({self.info.architecture}) keeps no key-value cache, so a reply "
                    "cannot be continued token by token.",
                    then="Use it for extract, train and encode; to steer or to generate, set "
                    "model.name to a family of docs/families.md.",
                )
            logits = output.logits[:, -1].float()
            logits[:, self._barred] = -torch.inf
            step = max(map(len, replies)) + 1
            check_logits(logits, alive, batch.items, rows, step, self._edits)
            tokens = choose(logits, temperature, streams)
            for row, token in enumerate(tokens.tolist()):
                alive[row] = alive[row] and token not in stops
                if alive[row]:
                    replies[row].append(token)
                    alive[row] = len(replies[row]) < room[row]
            chosen = tokens[:, None].to(self.device)
            ids = chosen if use_cache else torch.cat([ids, chosen], dim=1)
            going = torch.tensor(alive, device=self.device)[:, None]
            mask = torch.cat([mask, going], dim=1)
            last = positions.index[:, -1:]
            new = Positions(
                mask=going,
                index=torch.where(going, last + 1, last),
                special=torch.isin(chosen, self._special_ids),
                response=going,
                is_prefill=False,
                rows=rows,
            )
            positions = new if use_cache else joined(positions, new)
        return replies

    def _stop_ids(self) -> set[int]:
        settings = getattr(self.model, "generation_config", None)
        configured = getattr(settings, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return {i for i in (*several, self.tokenizer.eos_token_id) if i is not None}

    @torch.no_grad()
    def _forward(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch total"],
        positions: Positions,
        **options: Any,
    ) -> Any:
        options.setdefault("position_ids", positions.index)
        self._positions, self._ours = positions, True
        try:
            return self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                **{name: value for name, value in options.items() if name in self._takes},
            )
        finally:
            self._positions, self._ours = None, False

    def _observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out the positions of a forward pass that was not started here."""
        if self._ours:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        embedded = given if given is not None else kwargs["inputs_embeds"]
        batch, length = embedded.shape[:2]
        past = kwargs.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        whole = kwargs.get("attention_mask")
        if not isinstance(whole, Tensor) or whole.ndim != 2:
            whole = torch.ones(batch, seen + length, device=self.device)
        mask = whole.bool()[:, -length:]
        index = (whole.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        special = torch.zeros_like(mask) if given is None else torch.isin(given, self._special_ids)
        written = torch.zeros_like(mask)
        if given is not None and past is None:
            written = mask.clone()
            written[:, : self._tokens_given(given)] = False
        self._positions = Positions(
            mask=mask,
            index=index,
            special=special,
            response=mask if seen else written,
            is_prefill=not seen,
            generated=mask if seen else written,
        )

    def _tokens_given(self, ids: Int[Tensor, "batch seq"]) -> int:
        """Return how many tokens of a pass without a cache no pass before it led to."""
        before, given = self._observed or (ids[:, :0], 0)
        if ids is before:  # seen already, by the hook of a context around this one
            return given
        if not given or not torch.equal(ids[:, :-1], before):
            given = ids.shape[1]
        self._observed = ids, given
        return given

    def _place(self, site: Site) -> tuple[nn.Module, Literal["in", "out"]]:
        place = super()._place(site)
        if site.part in self._unreadable:
            offer = "resid_pre" if "attn_out" in self._unreadable else "attn_out"
            raise MismatchError(
                f"{site.part} cannot be read in {self.name}: {self._unreadable[site.part]}.",
                then=f"Set extract.hook_point to {offer} or resid_post.",
            )
        return place

    def _read_ids(
        self, places: Sequence[tuple[Site, nn.Module, Literal["in", "out"]]], ids: list[int]
    ) -> dict[Site, Tensor]:
        """Return what some token ids give at some places."""
        given = torch.tensor([ids], device=self.device)
        positions = Positions(
            mask=torch.ones_like(given, dtype=torch.bool),
            index=torch.arange(len(ids), device=self.device)[None],
            special=torch.zeros_like(given, dtype=torch.bool),
            response=torch.zeros_like(given, dtype=torch.bool),
            is_prefill=True,
        )
        found: dict[Site, Tensor] = {}
        with capturing(places, (*given.shape, self.d_model), None, found):
            self._forward(given, positions.mask, positions, use_cache=False)
        return found

    def _check_parts(self) -> dict[str, str]:
        """Return the parts that are not where the family's layout says, each with the reason.

        In the first block, the residual between must be the input and what attention adds, and
        what attention and MLP add must account for all that the block adds.
        """
        within = [part for part in PARTS if part not in {"resid_pre", "resid_post"}]
        parts = ["resid_pre", "attn_out", "mlp_out", "resid_post", "post_attn_resid"]
        places = []
        for part in parts:
            try:
                places.append(
                    (Site(0, part), *place_of(Site(0, part), self.blocks[0], self.config))
                )
            except MismatchError as error:
                if part not in BETWEEN:  # a layout that knows of no place between says so itself
                    return dict.fromkeys(within, error.message.removesuffix("."))
        try:
            found = self._read_ids(places, [0, 1, 2, 3])
        except MismatchError as error:
            return dict.fromkeys(within, error.message.removesuffix("."))
        before, attn, mlp, after, *between = (found[place[0]].float().cpu() for place in places)
        gap = _gap([before, attn, mlp], after, self.dtype)
        if gap > 0.05:
            reason = (
                "its attention and MLP outputs do not add up to what its first block adds (they "
                f"differ by {gap:.0%})"
            )
            return dict.fromkeys(within, reason)
        if between and _gap([before, attn], between[0], self.dtype) > 0.05:
            return dict.fromkeys(BETWEEN, "its MLP does not read the residual behind its attention")
        return {}


def _gap(terms: Sequence[Tensor], total: Tensor, dtype: torch.dtype) -> float:
    """Return by how much a sum misses, relative to what is added to the first term.

    What the number format's rounding of a large first term explains does not count.
    """
    rounding = torch.finfo(dtype).eps * (terms[0].norm() + total.norm())
    missed = (sum(terms[1:], start=terms[0]) - total).norm() - rounding
    return float(missed / (total - terms[0]).norm().clamp(min=1e-9))
