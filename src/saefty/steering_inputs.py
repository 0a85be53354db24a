"""What steering needs before it begins: a vector, at a place of a model, with lengths for alpha."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saefty import fsio
from saefty.errors import ConfigError, MismatchError
from saefty.interventions.steer import Unit, step_of
from saefty.interventions.vectors import SteeringVector, load_vector
from saefty.judges.base import JUDGES
from saefty.models.base import ModelAdapter, ModelSection
from saefty.pairing import hub_name, model_relation
from saefty.records import PARTS, Example, Site
from saefty.sae_ts.scale import residual_norm
from saefty.saes.base import SparseAutoencoder
from saefty.steering_settings import JudgedSection, VectorSection
from saefty.steering_vectors import check_sae, decoder_vector, latent_maximum, open_sae

log = logging.getLogger(__name__)


USUAL = (0.1, 2.0)
"""Mean residual norms between which a vector usually does something and leaves a model whole."""
PLACED = "Name the block to add it at, too: steer.layer=20."
"""What to do about a bare vector."""
NAMED = "Name the model: model.name=FOLDER."
"""What to do about a vector that names none."""


class Given:
    """A vector as it was asked for, before the model is there.

    Args:
        section: Which vector, and where.

    Raises:
        ConfigError: If there is no such vector or latent, the SAE is one of several, or a saved
            vector does not say how large its latent becomes, in which alpha is to be counted.
        MismatchError: If nothing says which block to steer in.
        SaeftyError: As the loaders of vectors and SAEs.
    """

    def __init__(self, section: VectorSection) -> None:
        self.section = section
        self.sae: SparseAutoencoder | None = None
        if section.vector is not None:
            bare = None if section.layer is None else Site(section.layer, _part(section, None))
            vector = load_vector(section.vector, bare, how=PLACED)
        else:
            assert section.sae is not None  # the configuration has one vector
            assert section.latent is not None
            self.sae = _sae(section.sae, section.sae_id, section.layer)
            self.sae.site = _site(section, self.sae.site)
            if self.sae.site is None:
                raise MismatchError(
                    "the SAE does not say which block it reads.", then="Set steer.layer."
                )
            vector = decoder_vector(self.sae, {section.latent: 1.0})
        site = _site(section, vector.site)
        assert site is not None  # a vector has one
        # Lengths were measured at the vector's own place and say nothing of another one.
        norms = vector.norms if site == vector.site else {}
        self.vector = replace(vector, site=site, norms=norms)
        if section.unit == "latent" and self.sae is None:
            step_of(self.vector, "latent")  # which nothing here could measure

    def model_section(self, given: ModelSection | None, *, how: str = NAMED) -> ModelSection:
        """Return the model that was asked for, else the one that the vector was made on.

        Args:
            given: The model that was asked for.
            how: What to do where there is neither, as the next step of the message.

        Raises:
            ConfigError: If there is neither.
        """
        if given is not None:
            return given
        made_on = self.vector.provenance.get("model")
        if not made_on:
            raise ConfigError("the vector does not say which model it was made on.", then=how)
        return ModelSection(name=hub_name(str(made_on)))

    def fitted(self, model: ModelAdapter, prompts: Sequence[Example]) -> SteeringVector:
        """Return the vector with the length that its unit needs.

        The mean norm of the activations is always measured on the prompts: one that the vector
        brings is of the texts that it was made on, and alpha would mean another length for each
        way to make a vector.

        Args:
            model: The model, to which the vector must fit.
            prompts: What is measured on.

        Raises:
            ConfigError: If the model has no such layer, or the unit cannot be measured.
            MismatchError: If vector, SAE and model do not belong together.
            NumericError: If the latent fires nowhere on the prompts.
        """
        vector, section = self.vector, self.section
        vector.check_model(model)
        if self.sae is not None:
            check_sae(self.sae, model)
        else:
            _warn_of_other_model(vector, model.name)
        if section.unit == "residual":
            vector = vector.with_norms(residual=residual_norm(model, vector.site, prompts))
        if section.unit == "latent" and self.sae is not None:
            assert section.latent is not None
            if section.latent_max is not None:
                length = section.latent_max * vector.norm
            else:
                length = latent_maximum(model, self.sae, {section.latent: 1.0}, prompts)
            vector = vector.with_norms(latent=length)
        return replace(vector, values=vector.unit) if section.normalize else vector

    def record(self) -> dict[str, Any]:
        """Return what the replies depend on of the vector: its bytes and its place."""
        vector = self.vector
        return {
            "method": vector.method,
            "site": vector.site.name,
            "norms": dict(vector.norms),
            "xxh3_128": fsio.digest_bytes(vector.values.numpy().tobytes()),
        }


def norms_of_one(
    vector: SteeringVector, unit: Unit, model: ModelAdapter, prompts: Sequence[Example]
) -> float:
    """Return how many mean residual norms one alpha is, on these prompts.

    Args:
        vector: The vector, with the length that its unit needs.
        unit: What alpha counts.
        model: The model that it steers.
        prompts: What is measured on.
    """
    if unit == "residual":
        return 1.0
    return float(step_of(vector, unit).norm()) / residual_norm(model, vector.site, prompts)


def off_scale(alphas: Sequence[float], one: float) -> str:
    """Say that no alpha of a grid lies where vectors usually act; nothing where one does.

    Args:
        alphas: The grid.
        one: How many mean residual norms one alpha is.
    """
    strong = sorted(abs(alpha) * one for alpha in alphas if alpha)
    if any(USUAL[0] <= norms <= USUAL[1] for norms in strong):
        return ""
    ends = " to ".join(dict.fromkeys(f"{norms:.2g}" for norms in (strong[0], strong[-1])))
    return (
        f"The grid adds {ends} mean residual norms, and vectors usually act between "
        f"{USUAL[0]:g} and {USUAL[1]:g}: less hardly changes a reply, more breaks the model. What "
        "the vector can do is not seen here; steer.unit=residual counts alpha in these norms."
    )


def _sae(source: str, sae_id: str | None, layer: int | None) -> SparseAutoencoder:
    """Return the SAE that was asked for; of several, the one that reads the block to steer in."""
    try:
        return open_sae(source, sae_id)
    except ConfigError:
        if layer is None:
            raise
        return open_sae(source, sae_id, layer)


def _warn_of_other_model(vector: SteeringVector, name: str) -> None:
    """Say where a vector was made on another model than the one it steers."""
    made_on = vector.provenance.get("model")
    relation = model_relation(str(made_on), name) if made_on else "same"
    if relation != "same":
        kin = "its base or tuned sister" if relation == "base_and_tuned" else "another model"
        log.warning(
            "the %s vector was made on %s and steers %s, %s", vector.method, made_on, name, kin
        )


def _site(section: VectorSection, own: Site | None) -> Site | None:
    """Return where to steer: the place asked for, else the vector's or the SAE's own."""
    if section.layer is None:
        return own if own is None else Site(own.layer, _part(section, own))
    if own is not None and own.layer != section.layer:
        log.warning("the vector is of %s and is added at block %d", own, section.layer)
    return Site(section.layer, _part(section, own))


def _part(section: VectorSection, own: Site | None) -> str:
    part = section.hook_point or (own or Site(0)).part
    if part not in PARTS:
        raise ConfigError(f"steer.hook_point is one of {', '.join(PARTS)}, not {part!r}.")
    return part


def tell_requests(section: JudgedSection, prompts: int, doses: int, longest: int) -> None:
    """Say what judges at an endpoint will be asked, before hours of replies and not after.

    Args:
        section: Which judges.
        prompts: How many are replied to.
        doses: How often each is, that without steering among them.
        longest: Tokens of the longest reply.
    """
    paid = [
        judge
        for judge in (section.judge, section.fluency)
        if "max_requests" in inspect.signature(JUDGES[judge]).parameters
    ]
    if paid:
        log.info(
            "%s will be asked at most %s times (%d prompts, %d times each%s), about replies of up "
            "to %d tokens; max_requests and max_usd of judge_options are limits",
            " and ".join(dict.fromkeys(paid)), f"{len(paid) * prompts * doses:,}", prompts, doses,
            ", by two criteria" if len(paid) > 1 else "", longest,
        )  # fmt: skip
