"""Effect data from vectors to a targeted vector: exact in a linear world, whole on disk."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from linear_model import PROMPTS, LinearModel, linear_sae
from saefty import fsio
from saefty.config import build_config
from saefty.errors import ConfigError, InputError, IntegrityError, MismatchError, NumericError
from saefty.interventions.vectors import load_vector
from saefty.runs import check_files
from saefty.sae_ts.effects import (
    BASELINE,
    piece_path,
    pieces_of,
    read_effects,
    read_plan,
    training_vectors,
)
from saefty.sae_ts.fit import RidgeMap
from saefty.sae_ts.vectors import targeted_vector, trust_of
from saefty.stages import effects as stage
from saefty.stages.effects import EffectsConfig, run
from saefty.steering_vectors import decoder_vector, random_vector

D, LATENTS, TARGET = 16, 40, 7
CLEAN = [p.__class__(p.id, p.prompt, "w0") for p in PROMPTS]


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(D, D, generator=generator)
    return turn, torch.randn(D, LATENTS, generator=generator)


def measured(world, folder, vectors=200, **keys):
    turn, weights = world
    settings = {
        "model": {"name": "linear"},
        "effects": {"vectors": vectors, "rollouts": 2, "batch_rows": 64, "loss_rise": 2.0, **keys},
        "run": {"dir": str(folder)},
    }
    model, sae = LinearModel(turn), linear_sae(weights)
    outcome = run(
        build_config(EffectsConfig, settings), model=model, sae=sae, examples=PROMPTS, clean=CLEAN
    )
    return outcome, sae


@pytest.fixture(scope="module")
def effects(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects")
    measured(world, folder)
    return folder


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_effect_matrix_of_a_linear_world_is_recovered_through_rollouts(world, effects):
    turn, weights = world
    true = (turn @ weights).double().numpy()
    blocks = RidgeMap(read_effects(effects), 1e-6).blocks()
    found = np.concatenate([block for _, block in blocks], axis=1)
    assert min(cosine(found[:, k], true[:, k]) for k in range(LATENTS)) >= 0.99
    np.testing.assert_allclose(found, 2.0 * true, rtol=0.02, atol=0.05)  # a length of 2: the rise


def test_its_vector_moves_the_target_more_than_decoder_and_random_ones(world, effects):
    """At the default lambda, against decoder rows that are the best reading of the latents."""
    turn, weights = world
    sae = linear_sae(weights)
    with torch.no_grad():
        sae.W_dec.copy_(torch.linalg.pinv(weights))
    targets = {TARGET: 1.0, 11: 1.0}
    true = (turn @ weights).double()
    wanted = true[:, [7, 11]].sum(dim=1)
    decoder = decoder_vector(sae, targets)
    assert float(decoder.unit @ weights[:, [7, 11]].sum(dim=1)) > 0, "it points at the target"
    found = replace(read_effects(effects), facts={})  # the latents are those of the same encoder
    own = targeted_vector(found, sae, targets)
    assert own.provenance["lambda"] == 1.0
    reach = float(own.unit.double() @ wanted)
    most = float(targeted_vector(found, sae, targets, lam=0.0).unit.double() @ wanted)
    assert most == pytest.approx(float(wanted.norm()), rel=1e-3)  # the most that any vector can
    rivals = [decoder, *(random_vector(D, sae.site, seed=n) for n in range(50))]
    assert reach > max(float(one.unit.double() @ wanted) for one in rivals)


def test_lambda_takes_out_what_every_vector_does(world, effects):
    found = read_effects(effects)
    shifted = found.__class__(
        found.vectors,
        found.steered,
        found.baseline - np.linspace(0, 30, LATENTS),
        found.scale,
        found.site,
        found.facts,
    )
    fitted = RidgeMap(shifted, 1e-6)
    common = fitted.toward(fitted.bias)
    with_it = targeted_vector(shifted, linear_sae(world[1]), {TARGET: 1.0}, lam=0.0, penalty=1e-6)
    without = targeted_vector(shifted, linear_sae(world[1]), {TARGET: 1.0}, lam=1.0, penalty=1e-6)
    assert cosine(without.values.numpy(), common) < cosine(with_it.values.numpy(), common)


def test_the_vector_says_how_well_its_target_was_predicted(world, effects, tmp_path):
    made = targeted_vector(read_effects(effects), linear_sae(world[1]), {TARGET: 1.0})
    kept = load_vector(made.save(tmp_path / "v"))
    trust = kept.provenance["held_out"]
    assert trust["correlation"] > 0.999
    assert trust["vectors"] == 40
    assert kept.provenance["latents"] == [[TARGET, 1.0]]
    assert kept.norm == pytest.approx(1.0, abs=1e-6)
    assert kept.norms["residual"] > 0
    told = trust_of(kept)
    assert (told.correlation, told.vectors) == (trust["correlation"], 40)
    assert not told.is_low
    spoilt = replace(kept, provenance={"held_out": {**trust, "correlation": None, "low": None}})
    assert trust_of(spoilt).is_low, "NaN is kept as null"
    assert trust_of(replace(kept, provenance={})) is None


def test_a_target_that_does_not_move_gets_no_vector_or_a_warning(world, tmp_path, caplog):
    turn, weights = world
    still = weights.clone()
    still[:, 3] = 0.0
    outcome, sae = measured((turn, still), tmp_path, vectors=40)
    found = read_effects(outcome.folder)
    changed = np.abs(found.steered.toarray() - found.baseline) > 1e-6 * (1 + found.baseline)
    assert (changed[:, 3].sum(), changed[:, 5].sum()) == (0, 40)
    with pytest.raises(NumericError, match="moved under none"):
        targeted_vector(found, sae, {3: 1.0})
    caplog.clear()
    targeted_vector(found, sae, {3: 1.0}, way="rotation")  # learns from the other latents
    assert "latent 3 did not move among 8 held-out vectors (moved under 0% of all)" in caplog.text
    caplog.clear()
    group = targeted_vector(found, sae, {5: 1.0, 3: 1.0})
    assert "1 of the 2 latents of the target moved under none of the 40 training" in caplog.text
    assert group.provenance["unmoved"] == [3]
    torch.testing.assert_close(group.unit, targeted_vector(found, sae, {5: 1.0}).unit)


def test_a_run_that_was_cut_short_ends_with_the_same_bytes(world, effects, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(effects, folder)
    digests = {p.name: fsio.digest(p) for p in folder.rglob("*.safetensors")}
    for path in (folder / "finished.json", piece_path(folder, 1), piece_path(folder, 3)):
        path.unlink()
    turn, weights = world
    measured((turn, weights), folder)
    assert {p.name: fsio.digest(p) for p in folder.rglob("*.safetensors")} == digests
    assert check_files(folder)


def test_rollouts_measured_piece_by_piece_are_those_measured_together(world, tmp_path, monkeypatch):
    """Five rollouts of 30 vectors: in pieces of two rollouts and ten vectors, and in one piece."""
    together, _ = measured(world, tmp_path / "one", vectors=30, rollouts=5)
    monkeypatch.setattr(stage, "PIECE_ROLLOUTS", 2)
    apart, _ = measured(world, tmp_path / "many", vectors=30, rollouts=5, batch_rows=13)
    pieces = pieces_of(read_plan(apart.folder)[1], 30)
    assert [(piece.vectors, piece.rollouts) for piece in pieces[:4]] == [
        ((0, 10), (0, 2)), ((0, 10), (2, 4)), ((0, 10), (4, 5)), ((10, 20), (0, 2))
    ]  # fmt: skip
    assert len(pieces) == 9
    one, many = read_effects(together.folder), read_effects(apart.folder)
    np.testing.assert_array_equal(one.vectors, many.vectors)
    np.testing.assert_allclose(one.steered.toarray(), many.steered.toarray(), rtol=1e-5)


def test_a_damaged_piece_is_told_by_name(effects, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(effects, folder)
    path = piece_path(folder, 3)
    data = bytearray(path.read_bytes())
    data[-8] ^= 255
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"00003\.safetensors is damaged"):
        read_effects(folder)
    (folder / BASELINE).unlink()
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        read_effects(folder)


def test_the_scale_is_found_on_texts_and_vectors_that_are_drawn(world, effects, tmp_path):
    facts = read_effects(effects).facts
    assert len(facts["scale_vectors"]) == 16
    assert facts["scale_vectors"] != list(range(16))
    assert sorted(facts["scale_texts"]) == sorted(one.id for one in CLEAN)
    other, _ = measured(world, tmp_path, vectors=20, seed=1)
    assert read_effects(other.folder).facts["scale_vectors"] != facts["scale_vectors"]


def test_a_blank_prompt_is_told_by_its_own_id(world, tmp_path):
    turn, weights = world
    cfg = build_config(
        EffectsConfig, {"model": {"name": "linear"}, "run": {"dir": str(tmp_path / "r")}}
    )
    blank = [*PROMPTS, replace(PROMPTS[0], id="mine", prompt="  ")]
    with pytest.raises(InputError, match="1 of 4 prompts are empty: mine"):
        run(cfg, model=LinearModel(turn), sae=linear_sae(weights), examples=blank)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("fit", ["ridge", "descent"])
def test_what_is_held_out_is_of_the_fit_that_made_the_vector(world, effects, fit):
    made = targeted_vector(read_effects(effects), linear_sae(world[1]), {TARGET: 1.0}, fit=fit)
    assert made.provenance["held_out"]["fit"] == fit == made.provenance["fit"]
    assert (made.provenance["penalty"] is None) == (fit == "descent")
    assert made.provenance["held_out"]["correlation"] > 0.99


def test_effects_of_another_sae_are_refused(world, effects):
    with pytest.raises(MismatchError, match="were measured with the SAE of checksum"):
        targeted_vector(read_effects(effects), linear_sae(world[1] * 2), {TARGET: 1.0})


def test_a_latent_out_of_range_is_named(world, effects):
    with pytest.raises(ConfigError, match=r"latent 40 does not exist: the SAE has 40 latents"):
        targeted_vector(read_effects(effects), linear_sae(world[1]), {40: 1.0})


def test_a_folder_without_effects_is_told(tmp_path):
    with pytest.raises(ConfigError, match="holds no effect data"):
        read_effects(tmp_path)


def test_latents_that_do_not_fire_take_no_room(world, tmp_path):
    turn, weights = world
    sae = linear_sae(weights)
    with torch.no_grad():
        sae.b_enc[10:] = -1e6
    settings = build_config(
        EffectsConfig,
        {
            "model": {"name": "linear"},
            "effects": {"vectors": 20, "rollouts": 2, "scale": 1.0},
            "run": {"dir": str(tmp_path)},
        },
    )
    run(settings, model=LinearModel(turn), sae=sae, examples=PROMPTS, clean=CLEAN)
    found = read_effects(tmp_path)
    assert found.steered.nnz == 20 * 10
    assert found.scale == 1.0


@pytest.mark.parametrize(("kind", "decoder_rows"), [("random", 0), ("decoder", 20), ("mixed", 10)])
def test_training_vectors_are_units_of_their_kind(world, kind, decoder_rows):
    sae = linear_sae(world[1])
    found = training_vectors(kind, 20, sae, seed=1)
    np.testing.assert_allclose(found.norm(dim=1), 1.0, atol=1e-6)
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    assert int(((found @ rows.T).max(dim=1).values > 0.9999).sum()) == decoder_rows
    assert torch.equal(found, training_vectors(kind, 20, sae, seed=1))
    assert not torch.equal(found, training_vectors(kind, 20, sae, seed=2))


def test_more_decoder_rows_than_there_are_is_told(world):
    with pytest.raises(ConfigError, match="41 decoder rows were asked for, but the SAE has 40"):
        training_vectors("decoder", 41, linear_sae(world[1]), seed=0)
