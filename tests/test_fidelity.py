import math

import numpy as np
import pytest
import torch

from saefty.errors import InputError, NumericError
from saefty.fidelity import Fidelity, LossRecovered, measure_fidelity, measure_loss_recovered
from saefty.models.base import load_model
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig

# The SAE reads two numbers and fires a latent for each positive one: x̂ = max(x, 0).
X = torch.tensor([[3.0, -1.0], [1.0, 2.0], [-2.0, -2.0], [4.0, 0.0]])


def positive_part(d_in=2):
    sae = SaeConfig("topk", d_in, d_in, d_in).build()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d_in))
        sae.W_dec.copy_(torch.eye(d_in))
    return sae


def exact(d_in):
    """x = max(x, 0) - max(-x, 0): an SAE without any error."""
    sae = SaeConfig("topk", d_in, 2 * d_in, 2 * d_in).build()
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
    return sae


def test_fvu_is_error_over_variance_about_the_mean():
    # Errors 1 + 0 + 8 + 0; about the mean (1.5, -0.25): 21 in the first column, 8.75 in the second.
    figures = measure_fidelity(positive_part(), [X])
    assert figures.squared_error == 9
    assert figures.variance == 29.75
    assert figures.fvu == pytest.approx(9 / 29.75)
    assert figures.record()["explained_variance"] == pytest.approx(1 - 9 / 29.75)


def test_l0_silence_and_the_histogram_count_firing_latents():
    figures = measure_fidelity(positive_part(), [X])
    assert figures.l0_mean == 1.0  # 1, 2, 0, 1
    assert figures.k_histogram() == {"l0": [0, 1, 2, 3], "rows": [1, 2, 1]}
    assert figures.fired.tolist() == [3, 1]
    assert figures.silent_share == 0.0


def test_a_latent_that_never_fires_is_silent_and_one_that_always_does_is_always_on():
    figures = measure_fidelity(positive_part(), [torch.tensor([[1.0, -1.0], [2.0, -3.0]])])
    assert figures.silent_share == 0.5
    assert figures.always_on_share == 0.5


def test_cosine_is_the_mean_over_rows():
    figures = measure_fidelity(positive_part(), [X[:2]])
    assert figures.cosine == pytest.approx((3 / math.sqrt(10) + 1) / 2)


def test_batches_give_what_one_batch_gives():
    x = torch.randn(501, 2, generator=torch.Generator().manual_seed(0)) + 50
    one = measure_fidelity(positive_part(), [x])
    many = measure_fidelity(positive_part(), x.split(13))
    assert many.variance == pytest.approx(one.variance, rel=1e-12)
    assert many.squared_error == pytest.approx(one.squared_error, rel=1e-12)
    assert torch.equal(many.l0_counts, one.l0_counts)
    assert one.variance == pytest.approx(x.double().numpy().var(axis=0).sum() * 501)


def test_a_wide_histogram_has_at_most_fifty_bins():
    counts = torch.zeros(1000, dtype=torch.long)
    counts[[20, 400, 999]] = torch.tensor([1, 2, 3])
    figures = Fidelity(6, 0.0, 1.0, 1.0, counts, torch.zeros(4, dtype=torch.long))
    histogram = figures.k_histogram()
    assert len(histogram["rows"]) <= 50
    assert sum(histogram["rows"]) == 6
    assert histogram["l0"][0] == 20
    assert histogram["l0"][-1] > 999


def test_rows_that_do_not_vary_have_no_fvu():
    figures = measure_fidelity(positive_part(), [torch.ones(3, 2)])
    assert figures.fvu is None
    assert figures.record()["explained_variance"] is None


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        measure_fidelity(positive_part(), [])


def test_nan_is_refused():
    with pytest.raises(NumericError):
        measure_fidelity(positive_part(), [torch.full((2, 2), float("nan"))])


def test_loss_recovered_is_the_share_of_the_loss_that_zeros_cost():
    assert LossRecovered(2.0, 2.5, 4.0, 10).recovered == 0.75
    assert LossRecovered(2.0, 2.5, 2.0, 10).recovered is None


TEXTS = ["How do I bake bread at home?", "The dogs", "Write a short story about a robot."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import tiny_models

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.build("llama", folder)
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def items(model):
    return model.tokenize([Example(str(i), text, raw=True) for i, text in enumerate(TEXTS)])


def with_site(sae):
    sae.site = Site(1)
    return sae


def by_hand(model, items, replace):
    """Mean cross-entropy of the bare transformers model, one text at a time, own hook."""
    losses = []
    for item in items:
        ids = torch.as_tensor(np.asarray(item.ids), dtype=torch.long)[None]
        rows = torch.as_tensor(~item.special)

        def hook(module, args, output, rows=rows):
            h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            h[0, rows] = replace(h[0, rows])
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        handle = model.model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            logits = model.model(ids).logits[0].double()
        handle.remove()
        losses += torch.nn.functional.cross_entropy(
            logits[:-1], ids[0, 1:], reduction="none"
        ).tolist()
    return np.mean(losses), len(losses)


def test_the_three_losses_equal_those_of_the_bare_model_with_a_hook(model, items):
    sae = with_site(positive_part(model.d_model))
    figures = measure_loss_recovered(model, sae, items, token_budget=32)
    clean, n_targets = by_hand(model, items, lambda h: h)
    spliced, _ = by_hand(model, items, lambda h: h.clamp(min=0))
    zeroed, _ = by_hand(model, items, torch.zeros_like)
    assert figures.n_targets == n_targets
    assert figures.ce_clean == pytest.approx(clean, rel=1e-5)
    assert figures.ce_sae == pytest.approx(spliced, rel=1e-5)
    assert figures.ce_zero == pytest.approx(zeroed, rel=1e-5)
    assert figures.ce_sae != pytest.approx(figures.ce_clean, rel=1e-4)


def test_an_sae_without_error_costs_nothing(model, items):
    figures = measure_loss_recovered(model, with_site(exact(model.d_model)), items)
    assert figures.ce_sae == pytest.approx(figures.ce_clean, rel=1e-6)


def test_an_sae_that_says_nothing_is_as_bad_as_zeros(model, items):
    silent = with_site(SaeConfig("topk", model.d_model, 8, 2).build())
    figures = measure_loss_recovered(model, silent, items)
    assert figures.ce_sae == figures.ce_zero


def test_an_sae_without_a_site_is_a_mistake(model, items):
    with pytest.raises(ValueError, match="does not know its site"):
        measure_loss_recovered(model, positive_part(model.d_model), items)


def test_examples_without_a_target_are_refused(model):
    with pytest.raises(InputError, match="no example has a token to predict"):
        measure_loss_recovered(model, with_site(exact(model.d_model)), [])
