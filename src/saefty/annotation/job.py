"""annotate: features of every sample of a results file, put into a copy of the file.

The features are computed as `encode` computes them, into a store in a run's folder, piece by piece;
then the store is read in order beside the file, and the copy is written in one pass. So an
interrupted command goes on where it stopped, the output appears whole or not at all, and memory
depends on a piece, not on the file.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.annotation.entries import (
    Entry,
    count_errors,
    facts_of,
    make_entry,
    stored_codes,
)
from saefty.annotation.samples import Samples, file_inputs, scan_samples
from saefty.annotation.settings import AnnotateConfig, AnnotateSection
from saefty.annotation.splice import check_output, read_metadata, splice
from saefty.annotation.targets import Target, find_targets, wanted_saes
from saefty.annotation.templates import look_at_templates
from saefty.config import config_tree
from saefty.encoding import EncodedPiece, Encoding, finish_features
from saefty.engine import Report, Work
from saefty.errors import ConfigError, InputError
from saefty.models.base import ModelAdapter, inspect_model, load_model
from saefty.pieces import PieceReader, PieceTask
from saefty.piecework import Record, do_pieces
from saefty.reading import PLAN, Reading, prepare
from saefty.runs import JOURNAL, Ledger, Run, run_folder
from saefty.space import feature_bytes, planned_rows
from saefty.stages.base import Outcome, model_inputs, settle_arithmetic, workers_model
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, FeatureStore

log = logging.getLogger(__name__)

NAMED = 10  # samples that failed, in a warning


@dataclass(frozen=True)
class Annotated(Outcome):
    """What annotating did: its run folder, its figures and the file that was written."""

    output: Path
    ledger: Ledger

    def as_record(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {**super().as_record(), "output": str(self.output)}


def annotate(
    cfg: AnnotateConfig, *, model: ModelAdapter | None = None, verbose: bool = False
) -> Annotated:
    """Annotate a file; the same call goes on where an interrupted one stopped.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads `cfg.model`.
        verbose: Tell of every piece, and of every sample that failed.

    Raises:
        InputError: If the file cannot be read, holds no sample, or none can be read by the model.
        MismatchError: If an SAE does not belong to its layer or to the model.
        SaeftyError: As of every run.
    """
    section = cfg.annotate
    source = Path(section.input)
    if cfg.output.path is not None:
        check_output(source, cfg.output.path)
    samples = scan_samples(source)
    samples.chat = section.chat
    digest = file_inputs(source)
    samples.check_unchanged()
    folder = run_folder(_placed(cfg, digest).run, "annotate")
    if cfg.output.path is not None:
        _refuse_foreign(folder, cfg.output.path)
    info = inspect_model(cfg.model.name, cfg.model.revision) if model is None else model.info
    targets, saes = find_targets(wanted_saes(section), info)
    keys = name_targets(targets, read_metadata(samples))
    settle_arithmetic(cfg.engine, folder)
    worker_model = workers_model(cfg.engine, cfg.model, model)
    model = model or load_model(**cfg.model.model_dump())
    saes = saes.placed(model.device)
    look_at_templates(samples, model)
    inputs = {
        "saes": {str(key): record.checksum for key, record in saes.records.items()},
        "model": model_inputs(model),
        "data": digest,
        "kernels": saes.kernels,
    }
    with Run(folder, "annotate", config_tree(cfg), inputs) as current:
        reading = _prepared(model, samples, section, len(saes.sites))
        current.require_space(feature_bytes(planned_rows(reading, section), saes.fired))
        writer = StoreWriter(folder, KIND, current.fingerprint)
        work = EncodedPiece(PieceReader(model, saes.sites, section), saes, writer)
        elsewhere = None
        if worker_model is not None:
            key = current.fingerprint
            elsewhere = Encoding(
                worker_model, saes.sites, section, saes, folder, key, cfg.engine.workers
            )
        done = _told(work, len(reading.plan.pieces)) if verbose else work
        records = do_pieces(writer, reading, done, elsewhere, cfg.engine, model.release)
        store = finish_features(
            writer, records, saes, model_name=model.name, extra=[EXAMPLES, PLAN]
        )
        output = cfg.output.path or _fresh_name(source)
        _refuse_foreign(folder, output)  # another command may have written it meanwhile
        _sweep(folder, output)
        ledger = Ledger()
        failed = {name: why for one in records for name, why in (one.get("failed") or {}).items()}
        entries = _Entries(samples, reading, store, keys, cfg, model.max_length, failed, verbose)
        told = {name: target.record(cfg.output.top_k) for name, target in keys.items()}
        splice(samples, output, entries.all(ledger), told, partial(_note, folder, output))
        ledger.skipped["max_samples"] = len(samples) - len(reading.examples)
        ledger.skipped += Counter()  # no reason without a sample
        current.ledger = ledger
        figures = _figures(store, targets, ledger)
        current.finish(figures)
    return Annotated("annotate", folder, figures, output, ledger)


def name_targets(
    targets: Sequence[Target], metadata: Mapping[str, Mapping[str, Any]]
) -> dict[str, Target]:
    """Return under which key of the file each SAE's features go.

    The first SAE of a layer goes by `layer_L`, another by `layer_L__<sae_id>`, or where that is
    taken with its release behind it, then with a number. An SAE that is in the file already, of the
    same id and release, keeps its key, and what is there is replaced.

    Args:
        targets: The SAEs.
        metadata: The file's `sae_extraction_metadata`.
    """
    named: dict[str, Target] = {}
    for target in targets:
        own = (target.sae_id, target.sae_release)
        held = (
            name
            for name in _possible_keys(target, len(metadata) + len(targets))
            if name in metadata
            and (metadata[name].get("sae_id"), metadata[name].get("sae_release")) == own
        )
        free = (name for name in _possible_keys(target) if name not in metadata)
        name = next(one for one in chain(held, free) if one not in named)
        if name in metadata:
            log.info("%s of SAE %s is in the file already and is replaced", name, target.sae_id)
        elif metadata:
            log.info("%s is put beside %s", name, ", ".join(metadata))
        named[name] = target
    return named


def _possible_keys(target: Target, most: int | None = None) -> Iterator[str]:
    """Yield the keys that an SAE may have, the shortest first; None for `most` never ends."""
    plain = f"layer_{target.layer}"
    names = [plain, f"{plain}__{target.sae_id}"]
    if target.sae_release:
        names.append(f"{names[-1]}__{target.sae_release}")
    return islice(chain(names, (f"{names[-1]}__{number}" for number in count(2))), most)


class _Entries:
    """What is written of each sample, in order, from a store that is read in order."""

    def __init__(
        self,
        samples: Samples,
        reading: Reading,
        store: FeatureStore,
        keys: Mapping[str, Target],
        cfg: AnnotateConfig,
        max_length: int,
        failed: Mapping[str, str],
        verbose: bool,
    ) -> None:
        self.samples, self.reading, self.store, self.keys = samples, reading, store, keys
        self.top_k, self.tokens = cfg.output.top_k, cfg.annotate.tokens
        self.max_length, self.failed, self.verbose = max_length, failed, verbose

    def all(self, ledger: Ledger) -> Iterator[tuple[int, dict[str, Entry]]]:
        """Yield each sample's number and its entries; count in the ledger what became of it."""
        codes = stored_codes(self.store, [target.key for target in self.keys.values()])
        waiting = next(codes, None)
        told = 0
        for index in range(len(self.reading.examples)):
            facts = facts_of(
                index, self.samples, self.reading, self.max_length, self.failed, self.tokens
            )
            found = None
            if waiting is not None and waiting[0] == index:
                found, waiting = waiting[1], next(codes, None)
            made = {
                name: make_entry(
                    facts,
                    found[target.key] if found else None,
                    self.top_k,
                    last=self.tokens == "prompt_end",
                )
                for name, target in self.keys.items()
            }
            if count_errors(ledger.failed, [word for _, word in made.values()]):
                told += 1
                if self.verbose or told <= NAMED:
                    why = next(iter(made.values()))[0].get("error")
                    log.warning("%s: %s", self.samples.name(index), why)
            else:
                ledger.ok += 1
            yield index, {name: entry for name, (entry, _) in made.items()}
        if told > NAMED and not self.verbose:
            log.warning("%d further samples failed; each says why in the output", told - NAMED)


def _prepared(
    model: ModelAdapter, samples: Samples, section: AnnotateSection, n_sites: int
) -> Reading:
    try:
        return prepare(model, samples, section, n_sites, tell=False)
    except InputError as error:
        chosen = range(min(len(samples), section.limit_examples or len(samples)))
        named = list(islice((f"{samples.name(i)}: {samples.problem(i)}" for i in chosen
                             if samples.problem(i)), NAMED))  # fmt: skip
        if not named:
            raise
        raise InputError(
            f"none of the {len(chosen)} samples can be read by {model.name}: {'; '.join(named)}.",
            safe="No output was written.",
            then="Check the prompts and responses of these samples.",
        ) from error


def _placed(cfg: AnnotateConfig, digest: Mapping[str, Any]) -> AnnotateConfig:
    """Name the run by what its features depend on, unless its place was chosen."""
    if cfg.run.dir is not None or cfg.run.id is not None:
        return cfg
    tree = config_tree(cfg)
    decisive = {name: tree[name] for name in ("model", "annotate")}
    key = fsio.digest_bytes(fsio.dump_json([decisive, dict(digest)]).encode())[:10]
    stem = re.sub(r"[^\w.-]+", "-", Path(cfg.annotate.input).stem)[:60]
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"id": f"{stem}-{key}"})})


def _told(work: Work, n_pieces: int) -> Work:
    """Return work that tells of every piece that it has done."""

    def telling(task: PieceTask, report: Report) -> Record:
        record: Record = work(task, report)
        log.info("piece %d of %d: %d tokens encoded", task.index + 1, n_pieces, record["rows"])
        return record

    return telling


def _sweep(folder: Path, output: Path) -> None:
    """Remove what a killed command of this run left beside its output; note the one to come."""
    for line in fsio.read_lines(folder / JOURNAL):
        earlier = Path(line["output"]) if "output" in line else None
        if earlier is not None and earlier.parent.is_dir():
            for stray in earlier.parent.glob(f"{fsio.TEMP_PREFIX}*"):
                if stray.name.endswith(f"-{earlier.name[-80:]}"):
                    stray.unlink(missing_ok=True)
    fsio.append_line(folder / JOURNAL, {"output": str(output.absolute())})


def _note(folder: Path, output: Path, written: Path) -> None:
    """Note what is about to be put in the output's place, so that this run may replace it."""
    line = {"output": str(output.absolute()), "xxh3_128": fsio.digest(written)}
    fsio.append_line(folder / JOURNAL, line)


def _refuse_foreign(folder: Path, output: Path) -> None:
    """Refuse to replace a file unless this run wrote it there and nobody changed it since.

    Raises:
        ConfigError: If another file is in the output's place.
    """
    if not output.exists():
        return
    place, journal = str(output.absolute()), folder / JOURNAL
    lines = fsio.read_lines(journal) if journal.exists() else []
    own = {line.get("xxh3_128") for line in lines if line.get("output") == place} - {None}
    if own and fsio.digest(output) in own:
        return
    state = "was changed since this run wrote it" if own else "was not written by this run"
    raise ConfigError(
        f"the output {output} exists already ({output.stat().st_size:,} bytes) and {state}.",
        safe="Nothing in it was touched.",
        then="Name another file with --output, or delete this one.",
    )


def _fresh_name(source: Path) -> Path:
    """Return a name beside the input that no file has."""
    stem = f"{source.stem}_sae_{time.strftime('%Y%m%d_%H%M%S')}"
    names = [f"{stem}{end}.json" for end in ("", *(f"-{n}" for n in range(2, 99)))]
    return next(path for path in map(source.with_name, names) if not path.exists())


def _figures(store: FeatureStore, targets: Sequence[Target], ledger: Ledger) -> dict[str, Any]:
    n_tokens = max(store.n_tokens, 1)
    return {
        "samples": ledger.total,
        "tokens": store.n_tokens,
        "l0_mean": {
            f"{target.key}": store.manifest["nnz"][str(target.key)] / n_tokens for target in targets
        },
        "ledger": ledger.as_record(),
    }
