import numpy as np
import pytest
import torch

from saefty.saes.base import SaeSection
from saefty.saes.native import load_sae
from saefty.sandbox.planted import (
    PlantedDictionary,
    cosines,
    firing_f1,
    match,
    mean_max_cosine,
)
from saefty.training import OptimizerSection, TrainSection, train_saes

SMALL = PlantedDictionary(n_features=64, d_in=32, active=3.0, rarity=0.3)


def test_features_are_unit_vectors():
    np.testing.assert_allclose(np.linalg.norm(SMALL.features, axis=1), 1)


def test_a_row_is_its_features_times_their_amounts_and_the_mean():
    world = PlantedDictionary(n_features=8, d_in=4, active=2.0, noise=0.0)
    np.testing.assert_allclose(
        world.sample(50, 3), world.codes(50, 3) @ world.features + world.mean, rtol=1e-5
    )


def test_rows_hold_as_many_features_as_asked_for_on_average():
    present = SMALL.codes(20_000) > 0
    assert present.sum(axis=1).mean() == pytest.approx(3, rel=0.03)
    np.testing.assert_allclose(present.mean(axis=0), SMALL.rates, atol=0.01)


def test_dense_features_are_nearly_always_there_and_dead_ones_never():
    world = PlantedDictionary(n_features=20, d_in=16, active=2.0, n_dense=2, n_dead=3)
    rate = (world.codes(5000) > 0).mean(axis=0)
    assert (rate[15:17] > 0.9).all()
    assert (rate[17:] == 0).all()


def test_features_of_one_group_appear_together():
    world = PlantedDictionary(
        n_features=40, d_in=16, active=4.0, groups=4, together=0.8, rarity=0.0
    )
    present = world.codes(20_000) > 0
    correlation = np.corrcoef(present.T)
    group = np.arange(40) % 4
    same = (group[:, None] == group) & ~np.eye(40, dtype=bool)
    assert correlation[same].mean() > 0.1
    assert correlation[group[:, None] != group].mean() < 0
    assert present.sum(axis=1).mean() == pytest.approx(4, rel=0.05)


def test_the_same_seed_gives_the_same_rows_and_another_does_not():
    assert np.array_equal(SMALL.sample(10, 1), SMALL.sample(10, 1))
    assert not np.array_equal(SMALL.sample(10, 1), SMALL.sample(10, 2))


def test_a_source_yields_every_kept_row_once_an_epoch():
    source = SMALL.source(100)
    keep = np.arange(100) % 2 == 0
    numbers = np.concatenate(list(source.batch_rows(7, 5, keep=keep)))
    assert sorted(numbers) == list(range(0, 100, 2))
    batches = list(source.batches(0, 7, 5, keep=keep))
    again = list(source.batches(0, 7, 5, keep=keep, start=3))
    assert torch.equal(torch.cat(batches[3:]), torch.cat(again))


def test_cosines_are_those_of_the_definition():
    found = cosines(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(found, [[1, np.sqrt(0.5), 0]])


def test_mean_max_cosine_averages_each_features_best():
    features = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert mean_max_cosine(np.array([[3.0, 0.0], [1.0, 1.0]]), features) == pytest.approx(
        (1 + np.sqrt(0.5)) / 2
    )


def test_matching_gives_each_feature_a_latent_of_its_own():
    features = np.array([[1.0, 0.0], [0.8, 0.6]])
    assert match(np.array([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0]]), features).tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 directions cannot match 2"):
        match(features[:1], features)


def test_f1_counts_hits_against_misses_and_false_alarms():
    present = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=bool)
    fires = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    np.testing.assert_allclose(firing_f1(fires, present), [1, 0.5, 0])


def recover(world, arch, k, n_rows, folder, options=None, **train):
    """Train on a planted dictionary; return the mean max cosine and the mean F1 of firing."""
    section = TrainSection(**train)
    optimizer = OptimizerSection(lr=train_rate(world))
    sae = SaeSection(arch=arch, k=k, options=options or {})
    (trained,) = train_saes(world.source(n_rows), sae, section, optimizer, folder)
    sae, alive = load_sae(trained.folder), world.rates > 0
    directions = sae.W_dec.detach().double().numpy()
    fires = sae.encode(torch.from_numpy(world.sample(2000, 10**6))).detach().numpy() > 0
    latents = match(directions, world.features[alive])
    present = (world.codes(2000, 10**6) > 0)[:, alive]
    f1 = firing_f1(fires[:, latents], present).mean()
    return mean_max_cosine(directions, world.features[alive]), f1


def train_rate(world):
    return 3e-3 if world.d_in < 100 else 2e-3


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_small_dictionary_is_recovered(arch, tmp_path):
    cosine, f1 = recover(SMALL, arch, 3, 20_000, tmp_path, max_steps=1000, batch_size=512)
    assert cosine >= 0.95
    assert f1 >= 0.7


@pytest.mark.parametrize(
    ("arch", "options"),
    [("relu", {"l1": 2.0}), ("gated", {}), ("jumprelu", {}), ("matryoshka", {})],
)
def test_a_small_dictionary_is_recovered_by_the_others_too(arch, options, tmp_path):
    settings = {"max_steps": 1000, "batch_size": 512}
    cosine, f1 = recover(SMALL, arch, 3, 20_000, tmp_path, options, **settings)
    assert cosine >= 0.9
    assert f1 >= 0.7


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_thousand_features_in_512_dimensions_are_recovered(arch, seed, tmp_path):
    world = PlantedDictionary(seed=seed)
    cosine, f1 = recover(
        world, arch, 10, 200_000, tmp_path, max_steps=2000, batch_size=1024, seed=seed
    )
    assert cosine >= 0.95
    assert f1 >= 0.8


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_correlated_features_are_recovered_beside_dense_and_dead_ones(arch, tmp_path):
    world = PlantedDictionary(groups=20, n_dense=3, n_dead=50)
    cosine, _ = recover(world, arch, 13, 200_000, tmp_path, max_steps=2000, batch_size=1024)
    assert cosine >= 0.9
