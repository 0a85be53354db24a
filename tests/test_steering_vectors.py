"""Vectors of decoder rows, contrasts and chance, against NumPy and plain forward passes."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty.errors import ConfigError, InputError, MismatchError, NumericError
from saefty.interventions.gate import subtract
from saefty.latent_targets import parse_targets
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.steering_vectors import (
    caa_vector,
    check_sae,
    decoder_vector,
    latent_difference,
    latent_maximum,
    open_sae,
    random_vector,
)

SITE = Site(1)
D = tiny_models.D_MODEL
POSITIVE = [
    Example("p0", "the lazy dog", raw=True),
    Example("p1", "How do I bake bread?", "Mix flour and water."),
    Example("p2", "Write a story.", "A robot paints."),
]
NEGATIVE = [Example("n0", "the model reads", raw=True), Example("n1", "Hello?", "I cannot help.")]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def sae():
    return random_sae()


def random_sae(d_in=D, arch="topk"):
    made = SaeConfig(arch=arch, d_in=d_in, d_sae=48, k=6).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    made.site = SITE
    return made


def rows_by_hand(model, example, which):
    """The activations of a text's tokens that count, from transformers' own hidden states."""
    item = model.tokenize([example])[0]
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
    plain = np.flatnonzero(~item.special)
    response = [t for t in plain if item.roles[t] == 3]
    chosen = {"last": plain[-1:], "mean": plain, "response": response}[which]
    return states[np.asarray(chosen)].double()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_caa_is_the_difference_of_means_by_hand(model, pooling):
    sides = [
        np.mean([rows_by_hand(model, one, pooling).mean(dim=0).numpy() for one in side], axis=0)
        for side in (POSITIVE, NEGATIVE)
    ]
    found = caa_vector(model, SITE, POSITIVE, NEGATIVE, pooling=pooling)
    np.testing.assert_allclose(found.values.numpy(), sides[0] - sides[1], atol=1e-5)
    assert found.provenance["positive"] == 3


def test_over_the_response_only_texts_with_one_count(model, caplog):
    found = caa_vector(model, SITE, POSITIVE, NEGATIVE, pooling="response")
    positive = [rows_by_hand(model, one, "response").mean(dim=0) for one in POSITIVE[1:]]
    negative = rows_by_hand(model, NEGATIVE[1], "response").mean(dim=0)
    expected = torch.stack(positive).mean(dim=0) - negative
    torch.testing.assert_close(found.values.double(), expected, atol=1e-5, rtol=0)
    assert "1 of 3 texts are left out" in caplog.text


@pytest.mark.parametrize("sides", [(POSITIVE, []), ([], NEGATIVE)])
def test_a_contrast_of_one_side_is_refused_with_both_counts(model, sae, sides):
    counts = f"there are {len(sides[0])} positive and {len(sides[1])} negative"
    with pytest.raises(InputError, match=counts):
        caa_vector(model, SITE, *sides)
    with pytest.raises(InputError, match=counts):
        latent_difference(model, sae, *sides)


def test_very_unequal_sides_are_told_once_and_like_ones_are_not(model, caplog):
    """A mean of one text is that text, however many stand against it."""
    many = [Example(f"m{n}", f"the lazy dog {n}", raw=True) for n in range(4)]
    caa_vector(model, SITE, many[:3], NEGATIVE[:1])
    assert "unequal" not in caplog.text
    caa_vector(model, SITE, many, NEGATIVE[:1])
    assert caplog.text.count("very unequal, 4 positive and 1 negative texts") == 1


def test_both_contrasts_take_the_mean_over_tokens_unless_told(model, sae):
    for make, given in ((caa_vector, SITE), (latent_difference, sae)):
        own = make(model, given, POSITIVE, NEGATIVE)
        assert own.provenance["pooling"] == "mean"
        same = make(model, given, POSITIVE, NEGATIVE, pooling="mean")
        assert torch.equal(own.values, same.values)


def test_two_equal_sides_have_no_direction(model):
    with pytest.raises(NumericError, match="zero in all"):
        caa_vector(model, SITE, POSITIVE, POSITIVE)


def test_texts_without_a_response_are_refused_where_it_counts(model):
    with pytest.raises(InputError, match=r"none of the 1 texts .*\(response\)"):
        caa_vector(model, SITE, POSITIVE[:1], NEGATIVE, pooling="response")


@pytest.mark.parametrize("top", [None, 5])
def test_the_latent_difference_is_decoded_by_hand(model, sae, top):
    def mean(side):
        rows = [rows_by_hand(model, one, "mean").float() for one in side]
        each = [sae.encode(x).detach().double().mean(dim=0).numpy() for x in rows]
        return np.mean(each, axis=0)

    change = mean(POSITIVE) - mean(NEGATIVE)
    decoder = sae.W_dec.detach().double().numpy()
    order = np.argsort(-np.abs(change) * np.linalg.norm(decoder, axis=1))[: top or 48]
    found = latent_difference(model, sae, POSITIVE, NEGATIVE, top=top)
    np.testing.assert_allclose(found.values.numpy(), change[order] @ decoder[order], atol=1e-5)


def test_a_decoder_vector_is_what_gating_takes_out(sae):
    """h - subtract(h) of latents 3 and 9 is z_3 d_3 + z_9 d_9: the vector of those weights."""
    from interventions.test_gate import all_tokens

    x = torch.randn(1, 4, D, generator=torch.Generator().manual_seed(1))
    z = sae.encode(x[0]).detach()
    fires = (
        int((z > 0).all(dim=0).int().argmax()) if (z > 0).all(dim=0).any() else int(z[0].argmax())
    )
    taken = (x - subtract(sae, [fires])(x, all_tokens(1, 4)))[0, 0]
    found = decoder_vector(sae, {fires: float(z[0, fires])})
    torch.testing.assert_close(found.values, taken, atol=1e-5, rtol=0)


def test_weights_are_summed_over_latents(sae):
    rows = sae.W_dec.detach().double().numpy()
    found = decoder_vector(sae, {3: 1.0, 40: -0.5})
    np.testing.assert_allclose(found.values.numpy(), rows[3] - 0.5 * rows[40], atol=1e-6)
    assert found.provenance["latents"] == [[3, 1.0], [40, -0.5]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({48: 1.0}, r"latent 48 does not exist: the SAE has 48 latents, 0\.\.47"),
        ({}, "no latent is named"),
        ({3: 0.0}, "not all are 0"),
        ({3: float("nan")}, "finite number"),
    ],
)
def test_latents_and_weights_that_cannot_be_are_refused(sae, targets, message):
    with pytest.raises(ConfigError, match=message):
        decoder_vector(sae, targets)


def test_latents_are_read_from_words():
    assert parse_targets(["7", "12:0.5,40:-1e-1"]) == {7: 1.0, 12: 0.5, 40: -0.1}
    for words, message in ((["x"], "'x' names no latent"), (["7", "7:2"], "named twice"),
                           (["7:-"], "names no latent")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            parse_targets(words)


def test_a_random_vector_has_the_length_asked_for_and_follows_its_seed():
    found = random_vector(64, SITE, norm=7.5, seed=3)
    assert found.norm == pytest.approx(7.5, rel=1e-6)
    assert torch.equal(found.values, random_vector(64, SITE, norm=7.5, seed=3).values)
    assert abs(float(found.unit @ random_vector(64, SITE, seed=4).unit)) < 0.5


def test_no_direction_of_a_seed_is_one_of_another_seed():
    drawn = [random_vector(64, SITE, seed=seed, draw=n).unit for seed in range(3) for n in range(9)]
    alike = torch.stack(drawn) @ torch.stack(drawn).T - torch.eye(27)
    assert alike.abs().max() < 0.6


def test_a_latent_s_maximum_weighs_latents_as_the_vector_does(model, sae):
    weights = {3: 2.0, 9: -0.5}
    longest = 0.0
    for one in POSITIVE:
        z = sae.encode(rows_by_hand(model, one, "mean").float()).detach()[:, [3, 9]].double()
        added = (z * torch.tensor([2.0, -0.5])) @ sae.W_dec.detach().double()[[3, 9]]
        longest = max(longest, float(added.norm(dim=1).max()))
    assert latent_maximum(model, sae, weights, POSITIVE) == pytest.approx(longest, rel=1e-5)


def test_a_contrast_s_vector_knows_its_texts(model):
    first, second = (
        caa_vector(model, SITE, positive, NEGATIVE).provenance
        for positive in (POSITIVE, POSITIVE[:2])
    )
    assert first["positive"] == 3
    assert first["positive_xxh3_128"] != second["positive_xxh3_128"]
    assert first["negative_xxh3_128"] == second["negative_xxh3_128"]


def test_the_latent_s_maximum_is_the_longest_it_adds(model, sae):
    found = latent_maximum(model, sae, {3: 1.0, 9: 1.0}, POSITIVE)
    longest = 0.0
    for one in POSITIVE:
        z = sae.encode(rows_by_hand(model, one, "mean").float()).detach()[:, [3, 9]].double()
        added = z @ sae.W_dec.detach().double()[[3, 9]]
        longest = max(longest, float(added.norm(dim=1).max()))
    assert found == pytest.approx(longest, rel=1e-5)
    assert longest > 0


def test_an_sae_of_another_width_or_kind_is_refused(model):
    with pytest.raises(MismatchError, match=f"16 wide.*are {D} wide"):
        check_sae(random_sae(d_in=16), model)
    transcoder = SaeConfig(arch="relu", d_in=D, d_sae=8, k=0, d_out=D).build()
    transcoder.site = SITE
    with pytest.raises(MismatchError, match="steering"):
        check_sae(transcoder, model)
    deep = random_sae()
    deep.site = Site(9)
    with pytest.raises(ConfigError, match="layer 9"):
        check_sae(deep, model)


def test_an_sae_trained_on_another_model_is_warned_of(model, caplog):
    other = random_sae()
    other.metadata["model_name"] = "google/gemma-2-2b"
    check_sae(other, model)
    assert "was trained on google/gemma-2-2b" in caplog.text


def test_one_sae_is_opened_and_one_of_several_must_be_named(tmp_path):
    for layer in (0, 1):
        one = random_sae()
        one.site = Site(layer)
        save_sae(one, tmp_path / f"layer_{layer}")
    assert open_sae(str(tmp_path), layer=1).site == SITE
    with pytest.raises(ConfigError, match="holds 2 SAEs: 0, 1"):
        open_sae(str(tmp_path))
