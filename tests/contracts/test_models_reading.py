"""What every model family must do when it is read: give the true activations, and nothing else."""

import pytest
import torch

import tiny_models
import tiny_vlms
from family_truth import BETWEEN, EXAMPLES, FINAL_NORMS, LAYERS, NAMES, by_hand, n_hooks, parts_of
from saefty.errors import MismatchError
from saefty.models.selfcheck import LISTED_FAMILIES
from saefty.records import Site


@pytest.mark.parametrize("layer", LAYERS)
def test_every_part_is_what_the_block_computes(model, family, batch, layer):
    truth = by_hand(model, family, batch, layer)
    parts = parts_of(family)
    captured = model.capture(batch, [Site(layer, part) for part in parts])
    for part in parts:
        torch.testing.assert_close(captured[Site(layer, part)], truth[part], msg=part)


def test_the_block_output_is_captured_bit_for_bit(model, family, batch):
    captured = model.capture(batch, [Site(layer) for layer in LAYERS])
    for layer in LAYERS:
        assert torch.equal(
            captured[Site(layer)], by_hand(model, family, batch, layer)["resid_post"]
        )


def test_one_forward_over_many_sites_equals_one_for_each(model, batch):
    sites = [Site(2, "mlp_out"), Site(0), Site(1, "attn_out"), Site(2, "resid_pre")]
    together = model.capture(batch, sites)
    assert list(together) == sites
    for site in sites:
        assert torch.equal(together[site], model.capture(batch, [site])[site])


def test_blocks_equal_hidden_states_and_the_last_is_before_the_final_norm(family, batch):
    """transformers' own tuple holds the last block's output behind the final norm."""
    fresh = tiny_models.load_model(str(tiny_models.folder_of(family)))
    captured = fresh.capture(batch, [Site(layer) for layer in LAYERS])
    with torch.no_grad():
        states = fresh.model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.position_ids,
            output_hidden_states=True,
        ).hidden_states
        last = captured[Site(tiny_models.N_LAYERS - 1)]
        normed = fresh.model.get_submodule(FINAL_NORMS[family])(last)
    for layer in LAYERS[:-1]:
        torch.testing.assert_close(captured[Site(layer)], states[layer + 1])
    torch.testing.assert_close(normed, states[-1])
    assert (last - states[-1])[batch.mask].abs().max() > 0.1


def test_the_output_of_a_block_is_the_input_of_the_next(model, batch):
    found = model.capture(
        batch, [Site(layer, part) for layer in LAYERS for part in ("resid_pre", "resid_post")]
    )
    for layer in LAYERS[1:]:
        assert torch.equal(found[Site(layer, "resid_pre")], found[Site(layer - 1)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_read_alone(model, family, side):
    items = model.tokenize(EXAMPLES)
    together = model.collate(items, side=side)
    sites = [Site(layer, part) for layer in LAYERS for part in parts_of(family)]
    captured = model.capture(together, sites)
    for row, item in enumerate(items):
        alone = model.capture(model.collate([item]), sites)
        for site in sites:
            padded = captured[site][row][together.mask[row]]
            torch.testing.assert_close(padded, alone[site][0], atol=1e-5, rtol=1e-5, msg=str(site))


def test_only_the_wanted_rows_are_kept_in_order(model, batch):
    wanted = batch.mask & ~batch.special
    site = Site(1)
    rows = model.capture(batch, [site], rows=wanted)[site]
    assert torch.equal(rows, model.capture(batch, [site])[site][wanted])


def test_capture_leaves_the_model_as_it_was(model, batch):
    before, hooks = model.logits(batch), n_hooks(model)
    model.capture(batch, [Site(0)])
    assert n_hooks(model) == hooks
    assert torch.equal(model.logits(batch), before)


def test_capture_stops_before_what_it_does_not_need(model, family, batch):
    ran = []
    blocks = model.model.get_submodule(NAMES[family][0])
    handles = [
        blocks[1].register_forward_hook(lambda *a: ran.append("block 1")),
        blocks[2].register_forward_pre_hook(lambda *a: ran.append("block 2")),
        model.model.lm_head.register_forward_pre_hook(lambda *a: ran.append("lm_head")),
    ]
    model.capture(batch, [Site(1)])
    assert ran == ["block 1"]
    model.capture(batch, [Site(2)])
    assert "lm_head" not in ran
    for handle in handles:
        handle.remove()


def test_bfloat16_is_kept_and_finite(family):
    model = tiny_models.load(family, torch.bfloat16)
    batch = model.collate(model.tokenize(EXAMPLES))
    assert model.dtype == torch.bfloat16
    captured = model.capture(
        batch, [Site(layer, part) for layer in LAYERS for part in parts_of(family)]
    )
    for site, x in captured.items():
        assert x.dtype == torch.bfloat16, site
        assert x[batch.mask].isfinite().all(), site
    assert model.loss(batch).dtype == torch.float32
    with model.intervene(Site(1), lambda x, positions: x.float() + 1):
        assert model.logits(batch).dtype == torch.bfloat16


@pytest.mark.parametrize("part", BETWEEN)
@pytest.mark.parametrize("family", tiny_models.PARALLEL)
def test_parallel_families_refuse_what_lies_between_and_say_what_there_is(model, batch, part):
    offer = "attn_out or resid_post"
    with pytest.raises(MismatchError, match=f"{part} does not exist in .* models") as error:
        model.capture(batch, [Site(1, part)])
    assert offer in str(error.value)
    with (
        pytest.raises(MismatchError, match="run in parallel"),
        model.intervene(Site(1, part), lambda x, positions: x),
    ):
        pass


def test_every_listed_family_is_tested_here():
    assert {*tiny_models.CAUSAL_FAMILIES, *tiny_vlms.FAMILIES, "bert"} == LISTED_FAMILIES
