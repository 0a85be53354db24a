"""steer compare: several vectors on the same prompts and seeds, and what else each one does."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from saefty import fsio
from saefty.baselines import names_to_codes
from saefty.config import config_tree
from saefty.data.base import DataSection
from saefty.errors import ConfigError, NumericError
from saefty.interventions.steer import steer, step_of
from saefty.interventions.vectors import SteeringVector, load_vector
from saefty.judges.base import judge_record, make_judge
from saefty.latent_targets import sae_facts
from saefty.models.base import ModelAdapter
from saefty.off_target import attribute_shifts, harmless_cost, latent_map, reply_latents
from saefty.records import Example
from saefty.runs import Run, run_folder
from saefty.sae_ts.scale import residual_norm
from saefty.sae_ts.vectors import trust_of
from saefty.saes.base import SparseAutoencoder
from saefty.stages.base import (
    Outcome,
    data_inputs,
    existing_folder,
    model_inputs,
    open_data,
    open_model,
    settle_arithmetic,
)
from saefty.steering import (
    NAME,
    PLAIN,
    Arm,
    Dose,
    Replies,
    Sampling,
    check_names,
    check_prompts,
    gather,
    replies_under,
)
from saefty.steering_compare_report import write_comparison
from saefty.steering_compare_settings import CompareConfig, CompareSection
from saefty.steering_comparison import Comparison, compare, two_sides
from saefty.steering_inputs import tell_requests
from saefty.steering_report import BROKE
from saefty.steering_scores import check_judges, compares, judged, scores_of
from saefty.steering_tables import OffTargets, WayFacts
from saefty.steering_vectors import check_sae, open_sae, random_vector

log = logging.getLogger(__name__)

KIND = "steer_compare"
RANDOM = "random"
TARGETED = ("decoder", "sae_ts", "rotation", "pseudo_inverse")
"""Methods that are told which latents to move."""
PLACED = (
    'Write it with its place: sf.load_vector(PATH, sf.Site(20)).save("FOLDER") in Python, and name '
    "that folder in compare.vectors."
)
"""What to do about a bare vector, of which a comparison has no key to say where it is added."""
IN_REPLY = ("decode", "response")
"""Where to act on tokens of a reply alone: harmless text is then read as one."""


def run(
    cfg: CompareConfig,
    *,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
    harmless: Sequence[Example] | None = None,
    sae: SparseAutoencoder | None = None,
) -> Outcome:
    """Compare vectors and write the report; the same call on an existing folder resumes it.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Prompts that are read already; None reads `cfg.data`.
        harmless: Harmless text that is read already; None reads `cfg.harmless`, if it is set.
        sae: An SAE that is loaded already; None loads `compare.sae`, if it is set.

    Raises:
        ConfigError: If the grid has no spread, there is no vector or two share a name, or a judge
            cannot be made.
        InputError: If there are too few prompts, or too little could be scored.
        NumericError: If every strength of every vector turns the logits to NaN.
        MismatchError: If a vector, or the SAE, does not belong to the model.
    """
    settings = cfg.compare
    alphas = check_alphas(settings.alphas)
    attributes = {
        f"compare.attributes.{name}.judge": (one.judge, one.options)
        for name, one in settings.attributes.items()
    }
    check_judges(settings, "compare", attributes)
    vectors = {name: load_vector(path, how=PLACED) for name, path in settings.vectors.items()}
    _check_vectors(settings, vectors)
    prompts = open_data(cfg.data, examples)
    check_prompts(prompts)
    clusters = names_to_codes([prompt.group for prompt in prompts])
    two_sides(len(prompts), clusters, seed=settings.seed)
    safe = open_data(cfg.harmless or DataSection(), harmless) if cfg.harmless or harmless else []
    settle_arithmetic(cfg.engine, existing_folder(cfg.run, KIND))
    if sae is None and settings.sae is not None:
        sae = open_sae(settings.sae, settings.sae_id, settings.layer)
    model = model or open_model(cfg.model, sorted({one.site for one in vectors.values()}))
    for one in vectors.values():
        one.check_model(model)
    if sae is not None:
        check_sae(sae, model)
        sae = sae.to(model.device)
    inputs = {
        "model": model_inputs(model),
        "data": data_inputs(prompts),
        "harmless": data_inputs(safe) if safe else None,
        "vectors": {name: _digest(one) for name, one in vectors.items()},
        "sae": None if sae is None else sae_facts(sae)["sae_xxh3_128"],
        "judges": {
            "behaviour": judge_record(settings.judge, settings.judge_options),
            "fluency": judge_record(settings.fluency, settings.fluency_options),
            "attributes": {
                name: judge_record(one.judge, one.options)
                for name, one in settings.attributes.items()
            },
        },
        "threads": torch.get_num_threads(),
    }
    folder = run_folder(cfg.run, KIND)
    with Run(folder, "steer compare", config_tree(cfg), inputs) as current:
        if current.finished:
            log.info("%s is complete; set run.dir to a new folder to compare again", folder)
            return Outcome("steer compare", folder, current.figures)
        arms = _arms(settings, vectors, model, prompts)
        controls = [arm.name for arm in arms if arm.vector.method == RANDOM]
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.seed, settings.batch_size
        )
        doses = 1 + len(arms) * (len(alphas) - 1)  # all arms are the same at 0
        tell_requests(settings, len(prompts), doses, settings.max_new_tokens)
        steered = replies_under(model, prompts, arms, alphas, sampling, folder / "replies")
        replies = steered.replies
        gather(folder / "replies.jsonl", prompts, steered)
        scores = scores_of(settings, "compare", model, prompts, steered, folder / "scores")
        shown, fluent = scores["behaviour"], scores["fluency"]
        result = compare(
            shown,
            fluent,
            [arm.name for arm in arms],
            alphas,
            clusters,
            controls=controls,
            relative=compares(settings.fluency),
            coverage=settings.coverage,
            boots=settings.boots,
            permutations=settings.permutations,
            seed=settings.seed,
        )
        off = _off_targets(settings, model, sae, arms, result, prompts, replies, safe, folder)
        figures = write_comparison(
            folder,
            result,
            off,
            {arm.name: _facts(arm) for arm in arms},
            controls=controls,
            behaviour=settings.behaviour,
            judges=(settings.judge, settings.fluency),
            unit=settings.unit,
            coverage=settings.coverage,
            broken=steered.broken,
        )
        if steered.broken:
            current.ledger.failed[BROKE] = len(steered.broken) * len(prompts)
        both = np.concatenate([~np.isnan(shown[dose] * fluent[dose]) for dose in replies])
        current.ledger.ok = int(both.sum())
        if not both.all():
            current.ledger.skipped["no score"] = int((~both).sum())
        current.finish(figures)
    return Outcome("steer compare", folder, figures)


def check_alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return a grid of strengths in ascending order, with 0 in it.

    Raises:
        ConfigError: If a number is not finite, or fewer than two differ from 0.
    """
    if not all(map(np.isfinite, alphas)) or len(set(alphas) - {0.0}) < 2:
        raise ConfigError(
            f"the grid of alphas has no spread: {', '.join(map(str, alphas)) or 'nothing'} beside "
            "0, which is always in it; a strength is chosen among at least two.",
            then="Set for example compare.alphas=[0.25,0.5,1,2].",
        )
    return tuple(sorted({float(alpha) + 0.0 for alpha in (*alphas, 0.0)}))


def _check_vectors(settings: CompareSection, vectors: Mapping[str, SteeringVector]) -> None:
    """Refuse what cannot be compared: no vector of one's own, names that do not tell ways apart."""
    if not vectors:
        raise ConfigError(
            "there is no vector to compare.", then="Set compare.vectors={name: PATH}."
        )
    if all(one.method == RANDOM for one in vectors.values()):
        raise ConfigError(
            f"all {len(vectors)} vectors are random directions ({', '.join(vectors)}), against "
            "which others are measured.",
            then="Name a vector that was made to do something: compare.vectors={caa: PATH}.",
        )
    drawn = [f"{RANDOM}_{n + 1}" for n in range(settings.random)]
    taken = sorted({name.casefold() for name in vectors} & set(drawn))
    if taken:
        raise ConfigError(
            f"the name {taken[0]} in compare.vectors is that of a random direction that is drawn "
            f"({settings.random} are: {drawn[0]} to {drawn[-1]}).",
            then="Give the vector another name, or set compare.random=0.",
        )
    for one in vectors.values():
        if settings.unit == "latent":
            step_of(one, "latent")  # which nothing here could measure
    check_names([name for arm in (*vectors, *drawn) for name in _arm_names(arm, settings)])
    for name in settings.attributes:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} in compare.attributes cannot name an attribute: its scores are kept in "
                "a folder of that name.",
                then="Take letters, digits, spaces and any of _ . , - and no dot in front.",
            )


def _arm_names(name: str, settings: CompareSection) -> list[str]:
    """Return what a vector is called under each method."""
    methods = tuple(dict.fromkeys(settings.methods))
    return [name] if len(methods) == 1 else [f"{name}, method {method}" for method in methods]


def _arms(
    settings: CompareSection,
    vectors: Mapping[str, SteeringVector],
    model: ModelAdapter,
    prompts: Sequence[Example],
) -> list[Arm]:
    """Return every vector under every method, random directions after them.

    A random direction has the place and the lengths of the first vector.
    """
    first = next(iter(vectors.values()))
    drawn = {
        f"{RANDOM}_{n}": random_vector(
            first.d_model, first.site, norm=first.norm, seed=settings.seed, draw=n
        ).with_norms(**first.norms)
        for n in range(1, settings.random + 1)
    }
    every = {**vectors, **drawn}
    # One measure for all, on these prompts: alphas of different vectors are then comparable.
    norms = {site: residual_norm(model, site, prompts) for site in {v.site for v in every.values()}}
    every = {name: one.with_norms(residual=norms[one.site]) for name, one in every.items()}
    methods = tuple(dict.fromkeys(settings.methods))
    return [
        Arm(named, one, method, settings.unit, settings.where)
        for name, one in every.items()
        for named, method in zip(_arm_names(name, settings), methods, strict=True)
    ]


def _facts(arm: Arm) -> WayFacts:
    length = float(step_of(arm.vector, arm.unit).norm()) / arm.vector.norms["residual"]
    return WayFacts(length, trust_of(arm.vector))


def _off_targets(
    settings: CompareSection,
    model: ModelAdapter,
    sae: SparseAutoencoder | None,
    arms: Sequence[Arm],
    result: Comparison,
    prompts: Sequence[Example],
    replies: Replies,
    safe: Sequence[Example],
    folder: Path,
) -> OffTargets:
    """Return what else every way that steers does, at the strength that was chosen for it.

    On the prompts that had no part in choosing it, as everything that is reported.
    """
    prompts = [prompts[n] for n in result.reported]
    replies = {dose: [texts[n] for n in result.reported] for dose, texts in replies.items()}
    clusters = names_to_codes([prompt.group for prompt in prompts])
    by_name = {arm.name: arm for arm in arms}
    chosen = {way.name: Dose(way.name, way.best.alpha) for way in result.ways if way.steers}
    latents = {}
    if sae is not None:
        site = check_sae(sae, model)
        lengths = sae.W_dec.detach().double().norm(dim=1).cpu().numpy()
        before = reply_latents(model, sae, site, prompts, replies[PLAIN])
        for name, dose in chosen.items():
            after = reply_latents(model, sae, site, prompts, replies[dose])
            targets = _targets(by_name[name].vector, sae, dose.alpha)
            latents[name] = latent_map(before, after, lengths, targets, clusters)
    costs = {}
    if safe:
        for name, dose in chosen.items():
            arm = by_name[name]
            edit = steer(arm.vector, dose.alpha, method=arm.method, unit=arm.unit, where=arm.where)
            try:
                costs[name] = harmless_cost(
                    model,
                    arm.vector.site,
                    edit,
                    safe,
                    name=f"{name} at alpha {dose.alpha:g}",
                    as_reply=arm.where in IN_REPLY,
                    boots=settings.boots,
                    seed=settings.seed,
                )
            except NumericError as error:  # its replies are sound, and so are the other ways
                log.warning("%s What it costs there is not told.", error.message)
    attributes = _attributes(settings, chosen, prompts, replies, folder / "scores" / "attributes")
    shifts = attribute_shifts(
        attributes.pop(PLAIN.arm),
        attributes,
        clusters,
        boots=settings.boots,
        permutations=settings.permutations,
        seed=settings.seed,
    )
    return OffTargets(latents, shifts if settings.attributes else {}, costs)


def _attributes(
    settings: CompareSection,
    chosen: Mapping[str, Dose],
    prompts: Sequence[Example],
    replies: Replies,
    folder: Path,
) -> dict[str, dict[str, Float[np.ndarray, "prompts"]]]:
    """Return each attribute's scores without steering, and under each way's chosen dose."""
    found: dict[str, dict[str, Float[np.ndarray, "prompts"]]] = {
        name: {} for name in (PLAIN.arm, *chosen)
    }
    for attribute, section in settings.attributes.items():
        key = f"compare.attributes.{attribute}.judge"
        judge = make_judge(section.judge, section.options, key)
        doses = {PLAIN.arm: PLAIN, **chosen}
        asked = {dose: replies[dose] for dose in doses.values()}
        scores = judged(judge, attribute, prompts, asked, folder)
        for name, dose in doses.items():
            found[name][attribute] = scores[dose]
    return found


def _targets(vector: SteeringVector, sae: SparseAutoencoder, alpha: float) -> dict[int, float]:
    """Return the latents that a vector moves at alpha by how it was made, up where above 0."""
    if vector.method not in TARGETED:
        return {}
    if vector.provenance.get("sae_xxh3_128") != sae_facts(sae)["sae_xxh3_128"]:
        return {}
    sign = -1.0 if alpha < 0 else 1.0
    return {int(latent): sign * weight for latent, weight in vector.provenance.get("latents", ())}


def _digest(vector: SteeringVector) -> str:
    """Return a checksum of all that a comparison reads of a vector."""
    facts = {
        "site": vector.site.name,
        "method": vector.method,
        "norms": dict(vector.norms),
        "targets": [vector.provenance.get(key) for key in ("sae_xxh3_128", "latents", "held_out")],
    }
    return fsio.digest_bytes(
        vector.values.numpy().tobytes() + fsio.dump_json_line(facts).encode("utf-8")
    )
