"""δ of text models: what every family's attention adds, against two whole forward passes."""

import logging

import pytest
import torch
import transformers

import tiny_models
from contrast_truth import attention_of, blocks_of, by_two_passes, hooked, states, zeroed
from family_truth import EXAMPLES, LAYERS, NAMES, every, n_hooks
from saefty.config import build_config
from saefty.errors import ConfigError, MismatchError
from saefty.models.contrast import ContrastSection, capture_contrast
from saefty.models.contrast_check import check_contrast, rounding_share
from saefty.models.decoder import Decoder
from saefty.records import Site

ZERO = ContrastSection(method="zero_attention")
JOINT = ContrastSection(method="zero_attention", scope="joint")
READ = ("post_attn_resid", "post_attn_ln", "resid_post", "attn_out", "mlp_out")


@pytest.fixture
def llama():
    return tiny_models.load("llama")


def batch_of(model):
    return model.collate(model.tokenize(EXAMPLES))


def assert_equal_up_to_rounding(found, expected, scale):
    torch.testing.assert_close(found, expected, atol=2e-6 * float(scale.abs().max()), rtol=1e-5)


@every(*READ)
def test_the_fast_path_gives_what_two_passes_a_layer_give(family, part):
    model = tiny_models.load(family)
    batch = batch_of(model)
    if part == "mlp_out" and family in tiny_models.PARALLEL:  # its MLP does not read attention's
        with pytest.raises(ConfigError, match="mlp_out does not depend on it"):
            capture_contrast(model, batch, [Site(1, part)], None, ZERO)
        return
    expected = by_two_passes(model, family, batch, part, LAYERS, "zero_attention", "per_layer")
    on = states(model, family, batch, part, LAYERS)
    found = capture_contrast(model, batch, [Site(i, part) for i in LAYERS], None, ZERO)
    for layer in LAYERS:
        delta = found[Site(layer, part)]
        assert delta.dtype == torch.float32
        assert delta.norm() > 1e-3 * on[layer].norm()
        assert_equal_up_to_rounding(delta, expected[layer], on[layer])


@every("post_attn_resid", "resid_post")
def test_joint_turns_the_chosen_layers_off_and_no_other(family, part):
    model = tiny_models.load(family)
    batch = batch_of(model)
    expected = by_two_passes(model, family, batch, part, [0, 2], "zero_attention", "joint")
    on = states(model, family, batch, part, [0, 2])
    found = capture_contrast(model, batch, [Site(0, part), Site(2, part)], None, JOINT)
    for layer in (0, 2):
        assert_equal_up_to_rounding(found[Site(layer, part)], expected[layer], on[layer])
    alone = by_two_passes(model, family, batch, part, [2], "zero_attention", "per_layer")[2]
    assert (found[Site(2, part)] - alone).norm() > 0.01 * alone.norm()  # layer 0 is off too


@every("post_attn_resid")
def test_behind_attention_delta_is_what_attention_adds_after_its_post_norm(family, part):
    model = tiny_models.load(family)
    batch = batch_of(model)
    added = states(model, family, batch, "attn_out", [1])[1]
    found = capture_contrast(model, batch, [Site(1, part)], None, ZERO)[Site(1, part)]
    assert_equal_up_to_rounding(found, added, states(model, family, batch, part, [1])[1])


def test_several_parts_of_a_layer_are_read_in_one_pass(llama):
    batch = batch_of(llama)
    sites = [Site(layer, part) for part in READ for layer in (2, 0)]
    together = capture_contrast(llama, batch, sites, batch.mask, ZERO)
    assert list(together) == sites
    for site in sites:
        alone = capture_contrast(llama, batch, [site], None, ZERO)[site]
        assert torch.equal(together[site], alone[batch.mask])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("section", [ZERO, JOINT])
def test_half_precision_is_subtracted_in_float32(family, section):
    model = tiny_models.load(family, torch.bfloat16)
    batch = batch_of(model)
    for part in ("post_attn_resid", "resid_post"):
        expected = by_two_passes(
            model, family, batch, part, [0, 1], "zero_attention", section.scope
        )
        found = capture_contrast(model, batch, [Site(0, part), Site(1, part)], None, section)
        for layer in (0, 1):
            assert torch.equal(found[Site(layer, part)], expected[layer])


class Calls:
    """Counts how often modules compute."""

    def __init__(self, modules):
        self.modules, self.counts = modules, dict.fromkeys(modules, 0)

    def __enter__(self):
        self.own = {name: module.forward for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.forward = self.counting(name, self.own[name])
        return self.counts

    def counting(self, name, forward):
        def call(*args, **kwargs):
            self.counts[name] += 1
            return forward(*args, **kwargs)

        return call

    def __exit__(self, *error):
        for module in self.modules.values():
            del module.forward


@pytest.mark.parametrize(
    ("part", "scope", "attention", "mlp"),
    [
        # Layers 0 and 1 are read, of three: the last is never computed.
        ("post_attn_resid", "per_layer", [1, 1, 0], [1, 0, 0]),
        ("post_attn_ln", "per_layer", [1, 1, 0], [1, 0, 0]),
        ("resid_post", "per_layer", [1, 1, 0], [2, 2, 0]),
        ("post_attn_resid", "joint", [1, 1, 0], [2, 0, 0]),
        ("resid_post", "joint", [1, 1, 0], [2, 2, 0]),
    ],
)
def test_it_costs_one_pass_and_what_changes_in_the_layers_read(llama, part, scope, attention, mlp):
    batch = batch_of(llama)
    blocks, _ = blocks_of(llama, "llama")
    section = ContrastSection(method="zero_attention", scope=scope)
    modules = {("attention", i): b.self_attn for i, b in enumerate(blocks)}
    modules |= {("mlp", i): b.mlp for i, b in enumerate(blocks)}
    with Calls(modules) as counts:
        capture_contrast(llama, batch, [Site(0, part), Site(1, part)], batch.mask, section)
    assert [counts["attention", i] for i in LAYERS] == attention
    assert [counts["mlp", i] for i in LAYERS] == mlp
    with Calls({"embedding": llama.model.get_input_embeddings()}) as counts:
        capture_contrast(llama, batch, [Site(0, part), Site(1, part)], batch.mask, section)
    assert counts["embedding"] == (2 if scope == "joint" else 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("edited", ["resid_pre", *READ])
@pytest.mark.parametrize("part", ["post_attn_resid", "resid_post"])
def test_interventions_act_on_both_passes(family, edited, part):
    model = tiny_models.load(family)
    batch = batch_of(model)

    def edit(x, positions):
        return x * 1.5 + 0.1 * positions.index[..., None]

    layers = [0, 1]
    sites = [Site(layer, part) for layer in layers]
    with model.intervene(Site(0, edited), edit), model.intervene(Site(1, edited), edit):
        found = capture_contrast(model, batch, sites, None, ZERO)
        on = model.capture(batch, sites)
        # Zeros stand for what the module computes, and an intervention at its output comes behind.
        for layer, site in zip(layers, sites, strict=True):
            attention = attention_of(model, family, layer)
            own, form = attention.forward, {}
            with hooked(attention.register_forward_hook(lambda m, a, o, f=form: f.update(o=o))):
                model.capture(batch, [Site(2)])
            zeros = (torch.zeros_like(form["o"][0]), None)
            attention.forward = lambda *args, zeros=zeros, **kwargs: zeros
            off = model.capture(batch, [site])[site]
            attention.forward = own
            del attention.forward
            assert_equal_up_to_rounding(found[site], on[site] - off, on[site])


@pytest.mark.parametrize("section", [ZERO, JOINT])
def test_nothing_is_left_behind_after_an_exception(llama, section):
    batch = batch_of(llama)
    before, hooks = llama.logits(batch), n_hooks(llama)
    calls = []

    def fail_when_off(x, positions):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("the edit failed")
        return x

    site = Site(1, "mlp_out")
    with pytest.raises(RuntimeError, match="the edit failed"), llama.intervene(site, fail_when_off):
        capture_contrast(llama, batch, [Site(1), Site(2)], None, section)
    assert n_hooks(llama) == hooks
    assert not any("forward" in module.__dict__ for module in llama.model.modules())
    assert torch.equal(llama.logits(batch), before)


@pytest.mark.parametrize("section", [ZERO, JOINT])
def test_a_pass_without_contrast_is_as_it_was_afterwards(llama, section):
    batch = batch_of(llama)
    before, hooks = llama.logits(batch), n_hooks(llama)
    capture_contrast(llama, batch, [Site(0), Site(2)], None, section)
    assert n_hooks(llama) == hooks
    assert torch.equal(llama.logits(batch), before)


def test_a_forward_that_another_library_put_there_is_put_back(llama):
    """accelerate moves what a module reads by a `forward` of its own on the module."""
    module = llama.blocks[1].self_attn
    batch = batch_of(llama)
    expected = capture_contrast(llama, batch, [Site(1)], None, ZERO)[Site(1)]
    own = module.forward
    module.forward = moved = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        found = capture_contrast(llama, batch, [Site(1)], None, ZERO)[Site(1)]
        assert module.__dict__["forward"] is moved
    finally:
        del module.forward
    assert torch.equal(found, expected)


def test_a_model_whose_weights_lie_elsewhere_is_read_as_in_one_piece(llama):
    """Each module takes its weights, and what it reads, to the device when it is called."""
    accelerate = pytest.importorskip("accelerate")
    folder = tiny_models.folder_of("llama")
    inner = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    apart = Decoder(inner, llama.tokenizer, llama.info, {})
    accelerate.cpu_offload(inner, execution_device=torch.device("cpu"))
    own = {m: m.__dict__["forward"] for m in inner.modules() if "forward" in m.__dict__}
    batch, sites = batch_of(llama), [Site(0), Site(2, "post_attn_ln")]
    for section in (ZERO, JOINT):
        expected = capture_contrast(llama, batch, sites, None, section)
        found = capture_contrast(apart, batch, sites, None, section)
        assert all(torch.equal(found[site], expected[site]) for site in sites)
    assert all(module.__dict__["forward"] is forward for module, forward in own.items())
    assert len(own) > 15
    assert all(weight.device.type == "meta" for weight in inner.parameters())


@pytest.mark.parametrize("family", tiny_models.PARALLEL)
@pytest.mark.parametrize("part", ["post_attn_resid", "post_attn_ln"])
def test_parallel_families_refuse_what_lies_between(family, part):
    model = tiny_models.load(family)
    with pytest.raises(MismatchError, match="run in parallel") as refused:
        capture_contrast(model, batch_of(model), [Site(0, part)], None, ZERO)
    assert "attn_out or resid_post" in str(refused.value)


def test_what_lies_before_attention_is_refused_layer_by_layer_and_read_jointly(llama):
    batch = batch_of(llama)
    sites = [Site(0), Site(2, "resid_pre")]
    with pytest.raises(ConfigError, match="δ at blocks.2.hook_resid_pre is zero"):
        capture_contrast(llama, batch, sites, None, ZERO)
    found = capture_contrast(llama, batch, sites, None, JOINT)[sites[1]]
    expected = by_two_passes(llama, "llama", batch, "resid_pre", [0, 2], "zero_attention", "joint")
    torch.testing.assert_close(found, expected[2])


def test_a_text_model_has_no_cross_attention_and_is_told_the_other_methods(llama):
    section = ContrastSection(method="cross_attention")
    with pytest.raises(MismatchError, match="no cross-attention layers") as refused:
        capture_contrast(llama, batch_of(llama), [Site(0)], None, section)
    assert "method=knockout" in str(refused.value)
    assert "zero_attention" in str(refused.value)


def test_an_encoder_is_refused_because_its_attention_is_no_part_of_its_output():
    model = tiny_models.load("bert")
    batch = model.collate(model.tokenize(EXAMPLES[:1]))
    with pytest.raises(MismatchError, match="attention of each layer by itself") as refused:
        capture_contrast(model, batch, [Site(0)], None, ZERO)
    assert "method=none" in str(refused.value)


def test_a_layer_out_of_range_and_a_site_given_twice_are_refused(llama):
    batch = batch_of(llama)
    with pytest.raises(ConfigError, match="layer 7"):
        capture_contrast(llama, batch, [Site(7)], None, ZERO)
    with pytest.raises(ConfigError, match="2 times"):
        capture_contrast(llama, batch, [Site(0), Site(0)], None, ZERO)


def test_without_a_method_or_a_site_there_is_no_delta(llama):
    with pytest.raises(ValueError, match="method none"):
        capture_contrast(llama, batch_of(llama), [Site(0)], None, ContrastSection())
    with pytest.raises(ValueError, match="one site or more"):
        capture_contrast(llama, batch_of(llama), [], None, ZERO)


def test_the_seeds_word_for_cross_attention_means_it():
    assert build_config(ContrastSection, {"method": "cross_attn_off"}).method == "cross_attention"
    with pytest.raises(ConfigError, match=r"method: .*got 'cross_off'"):
        build_config(ContrastSection, {"method": "cross_off"})
    assert ContrastSection() == ContrastSection(method="none", scope="per_layer")


@pytest.mark.parametrize("section", [ZERO, JOINT])
@pytest.mark.parametrize("family", sorted(NAMES))
def test_the_self_check_passes_where_attention_adds_something(family, section):
    model = tiny_models.load(family)
    checked = check_contrast(model, batch_of(model), [Site(1), Site(2)], section)
    assert checked.image_seen is None  # there are no pixels to change
    assert all(share < 1e-4 for share in checked.rounding.values())


@pytest.mark.parametrize("section", [ZERO, JOINT])
def test_an_attention_that_adds_nothing_stops_the_run_and_names_the_layer(llama, section):
    weight = llama.blocks[1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    sites = [Site(0, "post_attn_resid"), Site(1, "post_attn_resid")]
    scope = [sites[1]] if section.scope == "joint" else sites
    with torch.no_grad():
        weight.zero_()
        try:
            with pytest.raises(MismatchError, match="had no effect at layer 1:") as refused:
                check_contrast(llama, batch_of(llama), scope, section)
        finally:
            weight.copy_(kept)
    assert "output weights" in str(refused.value)
    assert "blocks.1.hook_post_attn_resid" in str(refused.value)


def test_a_layer_that_computes_something_else_the_second_time_is_found_out(llama):
    calls = []

    def drift(module, args, output):
        calls.append(None)
        return output * (1 + 0.01 * len(calls))

    with (
        hooked(llama.blocks[2].mlp.register_forward_hook(drift)),
        pytest.raises(MismatchError, match="cannot be measured by computing the layer again"),
    ):
        check_contrast(llama, batch_of(llama), [Site(2)], ZERO)


def test_rounding_is_measured_beside_delta():
    """The estimate against the error itself, of numbers that were known more finely."""
    stream = torch.Generator().manual_seed(0)
    on = torch.randn(200, 64, generator=stream)
    change = 0.02 * torch.randn(200, 64, generator=stream)
    rounded = on.bfloat16(), (on - change).bfloat16()
    delta = rounded[0].float() - rounded[1].float()
    true = float((delta - change).norm() / change.norm())
    assert rounding_share(rounded[0], delta) == pytest.approx(true, rel=0.1)
    assert rounding_share(on, change) == pytest.approx(true * 2**-16, rel=0.1)


def test_much_rounding_is_told(caplog):
    model = tiny_models.load("llama", torch.bfloat16)
    weight = model.blocks[0].self_attn.o_proj.weight
    kept = weight.detach().clone()
    site = Site(0, "post_attn_resid")
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        check_contrast(model, batch_of(model), [site], ZERO)
        assert not caplog.messages
        weight.mul_(1e-2)
        checked = check_contrast(model, batch_of(model), [site], ZERO)
        weight.copy_(kept)
    assert checked.rounding[site] > 0.1
    share = f"{100 * checked.rounding[site]:.0f} %"
    assert f"rounding to bfloat16 comes to {share} of δ at {site}" in caplog.text
    assert "model.dtype=float32" in caplog.text


def test_the_truth_in_these_tests_turns_attention_off(llama):
    batch = batch_of(llama)
    with zeroed(llama, "llama", [1]):
        off = states(llama, "llama", batch, "attn_out", [1])[1]
    assert off.abs().max() == 0
    assert states(llama, "llama", batch, "attn_out", [1])[1].abs().max() > 0
