"""Several SAEs of a layer, of several layers and hook points, held or streamed, in one forward."""

import gc
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny_models
from piece_reading import read_pieces
from saefty import sae_sets
from saefty.config import load_config
from saefty.errors import ConfigError, MismatchError
from saefty.reading import ReadingSection, prepare
from saefty.records import Example, Site
from saefty.sae_sets import SaeSet, open_saes
from saefty.saes.base import SaeConfig, SparseAutoencoder
from saefty.saes.native import save_sae
from saefty.stages import encode
from saefty.stages.encode import EncodeConfig
from saefty.stores.features import FeatureStore, layer_of

D = tiny_models.D_MODEL
EXAMPLES = [Example(f"e{i}", f"How do I bake bread at home, number {i}?" * (1 + i % 3), raw=True)
            for i in range(9)]  # fmt: skip
ZOO = {
    "wide": (Site(1), 64),
    "narrow": (Site(1), 48),
    "layer_0": (Site(0), 48),
    "mlp": (Site(1, "mlp_out"), 40),
}
KEYS = [0, 1, "1__narrow", "1__mlp"]


def an_sae(seed, d_sae, site):
    r = np.random.default_rng(seed)
    sae = SaeConfig("relu", D, d_sae, 0).build()
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.copy_(torch.from_numpy(r.normal(size=tuple(value.shape)) / 4))
    sae.site = site
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Folders of four SAEs, three of which read the block 1, at two hook points."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, (name, (site, d_sae)) in enumerate(ZOO.items()):
        save_sae(an_sae(seed, d_sae, site), folder / name)
    return folder


def words(zoo, *names):
    return ",".join(str(zoo / name) for name in (names or ZOO))


def encoded(zoo, out, *more, names=()):
    cfg = load_config(
        EncodeConfig,
        None,
        [f"encode.sae={words(zoo, *names)}", f"model.name={tiny_models.folder_of('llama')}",
         "encode.save.shard_size=40", f"run.dir={out}", *more],
    )  # fmt: skip
    done = encode.run(cfg, model=tiny_models.load("llama"), examples=EXAMPLES)
    return FeatureStore(done.folder)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "manifest.json"
    }


def by_hand(zoo, name):
    """Return dense latents in float64, of the saved weights and activations read on their own."""
    held = {
        k: v.astype(np.float64)
        for k, v in load_file(zoo / name / "sae_weights.safetensors").items()
    }
    site, section = ZOO[name][0], ReadingSection()
    model = tiny_models.load("llama")
    reading = prepare(model, EXAMPLES, section)
    (piece,) = read_pieces(model, reading, [site], section)
    x = piece.activations[site].double().numpy()
    return np.maximum(x @ held["W_enc"] + held["b_enc"], 0)


def test_every_sae_of_a_layer_and_of_another_hook_point_has_its_own_key_and_latents(zoo, tmp_path):
    store = encoded(zoo, tmp_path / "f")
    assert store.layers == (0, 1)
    assert list(store.codes) == KEYS
    for key, name in zip(KEYS, ["layer_0", "wide", "narrow", "mlp"], strict=True):
        site, d_sae = ZOO[name]
        assert (store.site(key), store.d_sae(key)) == (site, d_sae)
        assert store.sae_folder(key) == str(zoo / name)
        assert (tmp_path / "f" / f"layer_{key}" / "index.safetensors").is_file()
        np.testing.assert_allclose(
            store.csr(key).toarray(), by_hand(zoo, name), rtol=1e-4, atol=1e-5
        )
    rows, values = store.tokens_of("1__mlp", 3, top=2)
    dense = by_hand(zoo, "mlp")[:, 3]
    np.testing.assert_allclose(values, np.sort(dense)[::-1][:2], rtol=1e-4)
    assert rows.tolist() == np.argsort(-dense)[:2].tolist()
    assert store.pooled("1__mlp").shape == (len(EXAMPLES), 40)
    assert store.manifest["nnz"]["1__mlp"] == store.csr("1__mlp").nnz
    with pytest.raises(MismatchError, match=r"\[0, 1, '1__narrow', '1__mlp'\], not 1__other"):
        store.csr("1__other")


def test_the_first_sae_of_each_layer_has_the_bytes_it_has_alone(zoo, tmp_path):
    encoded(zoo, tmp_path / "all")
    alone = encoded(zoo, tmp_path / "alone", names=["layer_0", "wide"])
    assert "codes" not in alone.manifest
    assert alone.codes == alone.layers == (0, 1)
    for key in (0, 1):
        for name in ("shard_00000", "index"):
            path = f"layer_{key}/{name}.safetensors"
            one, other = (FeatureStore(tmp_path / f).file(path) for f in ("all", "alone"))
            for array in one.names:
                np.testing.assert_array_equal(one.array(array), other.array(array))


@pytest.fixture
def in_memory(monkeypatch):
    """Count the SAEs that are in memory whenever one is loaded, the new one included."""
    alive: weakref.WeakSet[SparseAutoencoder] = weakref.WeakSet()
    counts = []
    real = sae_sets.load_sae

    def load(*args, **kwargs):
        sae = real(*args, **kwargs)
        alive.add(sae)
        counts.append(len(alive))
        return sae

    monkeypatch.setattr(sae_sets, "load_sae", load)
    return counts


def test_streamed_saes_write_the_same_bytes_and_only_one_is_ever_in_memory(
    zoo, tmp_path, in_memory
):
    gc.disable()  # nothing may depend on when garbage is collected
    try:
        encoded(zoo, tmp_path / "held")
        assert in_memory == [1, 2, 3, 4]
        in_memory.clear()
        encoded(zoo, tmp_path / "streamed", "engine.sae_memory_gb=0")
    finally:
        gc.enable()
    pieces = len(FeatureStore(tmp_path / "streamed").pieces)
    assert pieces > 2
    assert len(in_memory) >= 4 + 4 * pieces  # and those that the checks of types look at
    assert max(in_memory) == 1
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "held")


def test_as_many_are_kept_as_leave_room_for_the_largest_of_the_others(zoo, in_memory):
    widths = [ZOO[name][1] for name in ("layer_0", "wide", "narrow", "mlp")]
    size = {key: 4 * (2 * D * n + n + D) for key, n in zip(KEYS, widths, strict=True)}
    for bound, kept in (
        (sum(size.values()), set(KEYS)),
        (size[0] + size[1], {0}),
        (size[0] + size[1] - 1, {"1__mlp"}),
        (size["1__mlp"] + size[1] - 1, set()),
    ):
        in_memory.clear()
        saes = open_saes([str(zoo / name) for name in ZOO], memory_gb=bound / 1e9).placed("cpu")
        for key in saes:
            saes[key].encode(torch.zeros(1, D))
        in_memory.clear()
        for key in saes:
            saes[key].encode(torch.zeros(1, D))
        assert len(in_memory) == len(KEYS) - len(kept)
        assert max(in_memory, default=0) == (len(kept) + 1 if in_memory else 0)
        del saes


def test_a_run_begun_with_all_saes_in_memory_goes_on_with_one_at_a_time(zoo, tmp_path):
    done = encoded(zoo, tmp_path / "f")
    before = files_of(tmp_path / "f")
    for name in ("records/piece_00001.json", "manifest.json", "finished.json"):
        (tmp_path / "f" / name).unlink()
    (tmp_path / "f" / "layer_1__mlp" / "shard_00001.safetensors").unlink()
    again = encoded(zoo, tmp_path / "f", "engine.sae_memory_gb=0.00001")
    assert files_of(tmp_path / "f") == before
    assert again.manifest == done.manifest


def test_a_worker_gets_a_set_without_weights_and_notices_an_sae_that_has_changed(zoo, tmp_path):
    names = [str(zoo / "wide"), str(zoo / "mlp")]
    packed = pickle.dumps(open_saes(names))
    assert len(packed) < 10_000
    arrived = pickle.loads(packed).placed("cpu", workers=2)
    assert torch.equal(arrived["1__mlp"].W_enc, an_sae(3, 40, None).W_enc)
    save_sae(an_sae(0, 64, Site(1)), tmp_path / "sae")
    packed = pickle.dumps(open_saes([str(tmp_path / "sae")]))
    save_sae(an_sae(7, 64, Site(1)), tmp_path / "sae")
    with pytest.raises(MismatchError, match="has changed since this run began"):
        pickle.loads(packed)[1]


def test_an_sae_that_changes_between_two_pieces_is_noticed_where_it_is_streamed(tmp_path):
    save_sae(an_sae(0, 64, Site(1)), tmp_path / "sae")
    saes = open_saes([str(tmp_path / "sae")], memory_gb=0).placed("cpu")
    assert saes[1].d_sae == 64
    save_sae(an_sae(7, 64, Site(1)), tmp_path / "sae")
    with pytest.raises(MismatchError, match="has changed since this run began"):
        saes[1]


class Counted(torch.nn.Module):
    """Counts the calls of a block."""

    def __init__(self, block):
        super().__init__()
        self.calls, self.tokens = 0, 0
        block.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        self.calls += 1
        self.tokens += x.shape[0] * x.shape[1]


def test_all_saes_read_one_forward_pass_that_stops_after_the_deepest_of_their_blocks(zoo, tmp_path):
    model = tiny_models.load_model(str(tiny_models.folder_of("llama")))
    assert model.causal  # tried once a model
    blocks = [Counted(block) for block in model.blocks]
    cfg = load_config(
        EncodeConfig, None, [f"encode.sae={words(zoo)}", "model.name=x", f"run.dir={tmp_path}",
                             "encode.token_budget=64"],
    )  # fmt: skip
    before = [block.calls for block in blocks]
    encode.run(cfg, model=model, examples=EXAMPLES)
    plan = prepare(model, EXAMPLES, cfg.encode, 2).plan
    batches = sum(len(piece) for piece in plan.pieces)
    assert batches > 3
    assert [block.calls - n for block, n in zip(blocks, before, strict=True)] == [
        batches, batches, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", ["text", "prompt_end", "all"])
def test_only_the_wanted_rows_reach_an_sae(zoo, tmp_path, monkeypatch, tokens):
    seen = []
    real = SparseAutoencoder.encode_sparse
    monkeypatch.setattr(
        SparseAutoencoder, "encode_sparse", lambda self, x: seen.append(len(x)) or real(self, x)
    )
    store = encoded(zoo, tmp_path / "f", f"encode.tokens={tokens}", names=["wide", "layer_0"])
    items = tiny_models.load("llama").tokenize(EXAMPLES)
    wanted = {
        "text": sum(int((~item.special).sum()) for item in items),
        "all": sum(len(item.ids) for item in items),
        "prompt_end": len(items),
    }[tokens]
    assert store.n_tokens == wanted
    assert sum(seen) == 2 * wanted


def test_a_training_run_of_several_saes_a_layer_is_encoded_whole(zoo, tmp_path):
    for k in (4, 8):
        save_sae(an_sae(k, 48, Site(2)), tmp_path / "run" / f"layer_2_k{k}_d48")
    saes = open_saes([str(tmp_path / "run")])
    assert list(saes) == [2, "2__k8_d48"]
    save_sae(an_sae(5, 48, Site(2)), tmp_path / "other" / "layer_2")
    save_sae(an_sae(6, 48, Site(2)), tmp_path / "third" / "layer_2")
    names = [str(tmp_path / name) for name in ("run", "other", "third")]
    assert list(open_saes(names)) == [2, "2__k8_d48", "2__other", "2__third"]
    assert list(open_saes([names[0], names[0]])) == [2, "2__k8_d48", "2__k4_d48", "2__k8_d48-2"]


def test_saes_that_do_not_say_their_block_are_given_one_each_in_order(tmp_path):
    for name in ("a", "b"):
        save_sae(an_sae(1, 48, None), tmp_path / name)
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(open_saes(names, layers=[2, 0])) == [0, 2]
    assert open_saes(names, layers=[2, 0]).records[2].folder == names[0]
    assert list(open_saes(names, layers=[1])) == [1, "1__b"]
    assert open_saes(names[:1], layers=[1], hook_point="attn_out").sites == (Site(1, "attn_out"),)
    with pytest.raises(MismatchError, match="does not say which block") as error:
        open_saes(names)
    assert "encode.layers=[12]" in error.value.then


def test_an_sae_id_goes_with_each_source_or_several_with_one(zoo):
    ids = ["wide", "mlp", "layer_0"]
    assert list(open_saes([str(zoo)], ids)) == [0, 1, "1__mlp"]
    assert list(open_saes([str(zoo)] * 3, ids)) == [0, 1, "1__mlp"]
    with pytest.raises(ConfigError, match="2 sources and encode.sae_id 3 SAEs"):
        open_saes([str(zoo)] * 2, ids)


def test_layers_without_an_sae_are_named(zoo):
    with pytest.raises(MismatchError, match=re.escape("layers [2] were asked for")) as error:
        open_saes([str(zoo / name) for name in ZOO], layers=[1, 2])
    assert "holds SAEs of layers [0, 1]" in str(error.value)
    assert list(open_saes([str(zoo / name) for name in ZOO], layers=[0])) == [0]


@pytest.mark.parametrize(
    ("word", "sae"),
    [
        ("encode.sae=a,b", ("a", "b")),
        ("encode.sae=[a, b]", ("a", "b")),
        ("encode.sae=a", "a"),
        ("encode.sae='a, b'", ("a", "b")),
    ],
)
def test_several_saes_are_written_as_a_list_or_with_commas(word, sae):
    assert load_config(EncodeConfig, None, [word, "encode.store=x"]).encode.sae == sae


def test_a_folder_with_a_comma_in_its_name_is_one_folder(tmp_path):
    (tmp_path / "a,b").mkdir()
    given = load_config(EncodeConfig, None, [f"encode.sae={tmp_path / 'a,b'}", "encode.store=x"])
    assert given.encode.sae == str(tmp_path / "a,b")


@pytest.mark.parametrize("word", ["encode.sae=a,,b", "encode.sae=[]"])
def test_a_list_with_nothing_in_it_is_refused(word):
    with pytest.raises(ConfigError, match="encode.sae: name at least one"):
        load_config(EncodeConfig, None, [word, "encode.store=x"])


def test_saes_handed_over_as_objects_may_share_a_layer(tmp_path):
    held = {1: an_sae(0, 64, Site(1)), "1__b": an_sae(1, 48, None)}
    cfg = load_config(EncodeConfig, None, ["model.name=x", f"run.dir={tmp_path}"])
    done = encode.run(cfg, model=tiny_models.load("llama"), examples=EXAMPLES, saes=held)
    store = FeatureStore(done.folder)
    assert store.codes == (1, "1__b")
    assert [layer_of(key) for key in store.codes] == [1, 1]
    assert store.site("1__b") == Site(1)
    assert isinstance(SaeSet.of(held)[1], SparseAutoencoder)
