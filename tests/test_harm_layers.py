"""An evaluation of stored δ from end to end, without a model, against NumPy on the same files."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from saefty import fsio
from saefty.config import load_config
from saefty.encoding import write_features
from saefty.errors import ConfigError, MismatchError
from saefty.pieces import Piece
from saefty.records import Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.stages.eval import EvalConfig, run
from saefty.stores.activations import KIND, ROW_COLUMNS, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import FeatureStore

N, D, D_SAE = 240, 10, 16
TRUTH = np.arange(N) % 2 == 0
LAYERS = (0, 2)
CONTRAST = {"method": "unknown", "scope": "unknown"}
FAST = ("eval.permutations=100", "eval.boots=100", "intervention.counts=[1,2]")


def rows_of(layer):
    """δ of each example: latents 3 and 5 fire on harmful ones, more clearly in layer 2."""
    rng = np.random.default_rng(layer)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    z = rng.random((N, D)) * (rng.random((N, D)) < 0.4)
    fires = rng.random((N, 2)) < np.where(TRUTH, 0.7 + 0.1 * layer, 0.1)[:, None]
    z[:, [3, 5]] = fires * rng.uniform(1, 2, (N, 2))
    return (z @ basis + 0.05 * rng.normal(size=(N, D))).astype(np.float32), basis


def sae_of(layer, basis, folder):
    """An SAE whose first latents are the directions that the rows are made of."""
    sae = SaeConfig("relu", D, D_SAE, 0).build()
    with torch.no_grad():
        sae.W_dec[:D] = torch.from_numpy(basis)
        sae.W_enc[:, :D] = torch.from_numpy(basis.T)
        sae.b_enc[:] = -0.15
    sae.site = Site(layer, "post_attn_resid")
    sae.metadata = {"contrast": CONTRAST}
    save_sae(sae, folder / f"layer_{layer}")
    (folder / f"layer_{layer}" / "metrics.json").write_text('{"fvu": 0.5}')
    return sae


def written(folder, labels=TRUTH):
    """Write a store of pooled δ of two layers, and an SAE of each."""
    x, saes = {}, {}
    for layer in LAYERS:
        x[layer], basis = rows_of(layer)
        saes[layer] = sae_of(layer, basis, folder / "s")
    table = {name: np.full(N, -1, kind) for name, kind in ROW_COLUMNS.items()}
    table["example"] = np.arange(N)
    writer = StoreWriter(folder / "x", KIND, "planted δ")
    rows = {layer: torch.from_numpy(values) for layer, values in x.items()}
    record = commit_activations(writer, 0, rows, table, {"masked": {}})
    records = [
        {"example_id": f"e{i}", "prompt": f"text {i}", "response": None, "messages": None,
         "image": None, "label": None if labels[i] is None else bool(labels[i]), "group": None,
         "source": "planted", "raw": True, "status": "ok", "text": f"text {i * 7919 % 1000}"}
        for i in range(N)
    ]  # fmt: skip
    fsio.commit_text(folder / "x" / EXAMPLES, "".join(map(fsio.dump_json_line, records)))
    facts = {
        "layers": list(LAYERS),
        "sites": {str(layer): f"blocks.{layer}.hook_post_attn_resid" for layer in LAYERS},
        "d_in": D,
        "dtype": "float32",
        "pooling": "text_only_mean",
        "contrast": CONTRAST,
    }
    writer.finish([record], facts, [EXAMPLES])
    return x, saes


def evaluate(folder, out, *words):
    given = (f"eval.sae={folder / 's'}", f"eval.store={folder / 'x'}", f"run.dir={out}")
    return run(load_config(EvalConfig, None, (*given, *FAST, *words)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    x, saes = written(folder)
    return folder, x, saes, evaluate(folder, folder / "r")


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def halves(folder):
    """Which examples were on the report half, from the numbers that the report gives."""
    from saefty.evaluation import evaluate_latents

    pooled = FeatureStore(folder / "r" / "features").pooled(0, "max").toarray()
    return evaluate_latents(pooled, TRUTH, permutations=100).report


def test_an_sae_of_an_unknown_contrast_needs_no_model_and_says_why_it_is_not_run(world):
    figures = world[3].figures["layers"]["2"]
    assert figures["gating"] is None
    assert "the contrast unknown" in figures["gating_left_out"]
    text = (world[0] / "r" / "summary.md").read_text()
    assert "Nothing was silenced in the forward pass" in text
    assert "In the stored activations, where no model runs" in text
    assert "weaker evidence than the forward pass" in text


@pytest.mark.parametrize("layer", LAYERS)
def test_the_curve_in_the_csv_is_what_numpy_makes_of_the_files(world, layer):
    folder, x, saes, outcome = world
    report = halves(folder)
    rows = table(folder / "r" / "intervention" / f"layer_{layer}_latent_space.csv")
    stored = outcome.figures["layers"][str(layer)]["latent_space"]
    assert set(stored["targets"]) == {3, 5}
    raw = x[layer].astype(np.float64)
    W_enc, W_dec = (w.detach().double().numpy() for w in (saes[layer].W_enc, saes[layer].W_dec))
    z = np.maximum(raw @ W_enc - 0.15, 0)
    learn = raw[~report]
    mean, std = learn.mean(axis=0), learn.std(axis=0)
    areas = []
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0):  # one of them the folds have chosen
        probe = LogisticRegression(C=strength, max_iter=1000)
        probe.fit((learn - mean) / std, TRUTH[~report])
        areas.append(probe.decision_function((raw[report] - mean) / std))
    for row in rows:
        arm = "targets" if row["arm"] == "target" else "controls"
        latents = stored[arm][: int(row["gated"])]
        gated = raw.copy()
        for latent in latents:
            gated -= np.outer(z[:, latent], W_dec[latent])
        relative = np.linalg.norm(gated - raw, axis=1) / np.linalg.norm(raw, axis=1)
        for label, mask in (("harmful", TRUTH), ("harmless", ~TRUTH)):
            mean_change = relative[report & mask].mean()
            assert float(row[f"relative_{label}"]) == pytest.approx(mean_change, abs=1e-5)
    base = [roc_auc_score(TRUTH[report], area) for area in areas]
    assert min(abs(float(rows[0]["auroc"]) - area) for area in base) < 1e-6
    assert float(rows[0]["safety"]) == 0.0
    last = {row["arm"]: float(row["safety"]) for row in rows if row["gated"] == "2"}
    assert last["target"] > 0.8
    assert last["target"] > last.get("control", 0.0) + 0.5


def test_the_json_beside_the_csv_holds_the_same_curve_as_the_summary(world):
    folder, _, _, outcome = world
    for layer in LAYERS:
        path = folder / "r" / "intervention" / f"layer_{layer}_latent_space.json"
        stored = json.loads(path.read_text())
        assert stored == outcome.figures["layers"][str(layer)]["latent_space"]
        rows = table(path.with_suffix(".csv"))
        assert [float(row["safety"]) for row in rows] == [
            point["safety"]["estimate"] for point in stored["points"]
        ]


def test_the_layers_stand_beside_each_other_in_a_table_and_a_picture(world):
    folder, x, saes, outcome = world
    rows = {row["layer"]: row for row in table(folder / "r" / "layers.csv")}
    assert list(rows) == ["0", "2"]
    for layer in LAYERS:
        row, figures = rows[str(layer)], outcome.figures["layers"][str(layer)]
        raw = x[layer].astype(np.float64)
        W_enc, W_dec = (w.detach().double().numpy() for w in (saes[layer].W_enc, saes[layer].W_dec))
        z = np.maximum(raw @ W_enc - 0.15, 0)
        fvu = ((raw - z @ W_dec) ** 2).sum() / ((raw - raw.mean(axis=0)) ** 2).sum()
        assert float(row["fvu"]) == pytest.approx(fvu, rel=1e-4)
        assert float(row["l0"]) == pytest.approx((z > 0).sum() / N)
        assert int(row["significant"]) == sum(one["found"] for one in figures["latents"]) == 2
        best = max(figures["latents"], key=lambda one: abs(one["selection"]["auroc"] - 0.5))
        assert int(row["best_latent"]) == best["latent"]
        for end, key in (("estimate", ""), ("low", "_low"), ("high", "_high")):
            assert float(row[f"best_auroc{key}"]) == best["auroc"][end]
            dense = figures["probes"][f"dense probe, layer {layer}, mean over tokens"]["auroc"]
            assert float(row[f"dense_probe{key}"]) == dense[end]
            for name in ("1 latent", "2 latents", "5 latents", "8 latents", "SAE latents"):
                column = name.lower().replace(" ", "_") + key
                assert float(row[column]) == figures["probes"][name]["auroc"][end]
    assert (folder / "r" / "figures" / "layers.png").stat().st_size > 5000
    text = (folder / "r" / "summary.md").read_text()
    assert "## Layers beside each other" in text
    assert "figures/layers.png" in text


def test_percentiles_are_numpys_of_the_scores_and_of_each_label(world):
    folder, _, _, outcome = world
    report = halves(folder)
    rows = table(folder / "r" / "layer_2_percentiles.csv")
    pooled = FeatureStore(folder / "r" / "features").pooled(2, "max").toarray().astype(np.float64)
    of_latents = [row for row in rows if row["of"] == "latent"]
    assert len(of_latents) == 2 * len(outcome.figures["layers"]["2"]["latents"])
    for row in of_latents:
        mask = report & (TRUTH if row["over"] == "harmful" else ~TRUTH)
        values = pooled[mask, int(row["latent"])]
        assert int(row["n"]) == len(values)
        assert float(row["zeros"]) == pytest.approx((values == 0).mean())
        for p in (1, 5, 25, 50, 75, 95, 99):
            assert float(row[f"p{p}"]) == pytest.approx(np.percentile(values, p))
    scores = {row["of"]: row for row in rows if row["over"] == "firing latents"}
    every = table(folder / "r" / "layer_2.csv")
    for name in ("auroc", "dfreq", "dmag", "consensus"):
        values = [float(row[name]) for row in every]
        assert float(scores[name]["p50"]) == pytest.approx(np.median(values))
        assert float(scores[name]["max"]) == pytest.approx(max(values))


def test_the_pictures_of_the_spread_and_of_the_curve_are_in_the_report(world):
    text = (world[0] / "r" / "summary.md").read_text()
    for name in ("figures/layer_2_scores.png", "figures/layer_2_pooled.png",
                 "intervention/layer_2_safety_curve.png"):  # fmt: skip
        assert f"({name})" in text
        assert (world[0] / "r" / name).stat().st_size > 5000


def test_subtract_takes_out_as_many_times_as_much_as_gate(world, tmp_path):
    folder, _, _, outcome = world
    words = ("eval.layers=[2]", "eval.baselines=false", "intervention.method=subtract")
    more = evaluate(folder, tmp_path / "2", *words, "intervention.strength=1.5")
    gate = outcome.figures["layers"]["2"]["latent_space"]
    for one, other in zip(gate["points"], more.figures["layers"]["2"]["latent_space"]["points"],
                          strict=True):  # fmt: skip
        for label in ("harmful", "harmless"):
            wanted = 1.5 * one[label]["relative"]["estimate"]
            assert other[label]["relative"]["estimate"] == pytest.approx(wanted)
    assert "1.5 times what they contribute" in (tmp_path / "2" / "summary.md").read_text()


def test_a_strength_of_gate_other_than_one_is_refused_with_what_to_set():
    words = ("eval.features=f", "intervention.strength=2")
    with pytest.raises(ConfigError, match="set intervention.method=subtract"):
        load_config(EvalConfig, None, words)


@pytest.mark.parametrize("counts", ["[]", "[0,1]"])
def test_counts_of_no_latents_are_refused(counts):
    with pytest.raises(ConfigError, match=r"intervention\.counts says how many"):
        load_config(EvalConfig, None, ("eval.features=f", f"intervention.counts={counts}"))


def features_of(folder, saes, name="f"):
    """Encode the store, each SAE twice: the second SAE of a layer has another name."""
    store = ActivationStore(folder / "x")
    store.copy_examples(folder / name)
    file = store.file("rows/shard_00000.safetensors")
    rows = {column: np.array(file.array(column)) for column in ROW_COLUMNS}
    x = {store.site(layer): store.shard(layer, 0) for layer in LAYERS}
    for layer in LAYERS:
        saes[layer].folder = folder / "s" / f"layer_{layer}"
    keyed = {**saes, "2__again": saes[2]}
    write_features(
        folder / name, "twice", lambda done: [Piece(0, rows, x, {})], keyed, model_name="",
        extra=[EXAMPLES],
    )  # fmt: skip
    return folder / name


def test_every_sae_of_a_layer_is_evaluated_beside_a_store_of_its_activations(world, tmp_path):
    folder, _, saes, outcome = world
    features = features_of(folder, saes)
    words = (f"eval.features={features}", f"eval.store={folder / 'x'}", f"run.dir={tmp_path}")
    found = run(load_config(EvalConfig, None, (*words, *FAST, "eval.layers=[2]")))
    assert list(found.figures["layers"]) == ["2", "2__again"]
    one, other = (found.figures["layers"][key] for key in ("2", "2__again"))
    assert one == other
    assert one["latent_space"] == outcome.figures["layers"]["2"]["latent_space"]
    assert "Layer 2, SAE again" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "layer_2__again.csv").exists()


def test_a_store_of_other_examples_beside_features_is_refused(world, tmp_path):
    folder, _, saes, _ = world
    features = features_of(folder, saes, "g")
    other = written_with_other_texts(tmp_path)
    words = (f"eval.features={features}", f"eval.store={other}", f"run.dir={tmp_path / 'r'}")
    with pytest.raises(MismatchError, match="not of the same examples: example 'e0' has another"):
        run(load_config(EvalConfig, None, (*words, *FAST)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"contrast": None}, r"of contrasts .*unknown.* eval.store .* plain"),
     ({"sites": {"0": "blocks.0.hook_resid_post", "2": "blocks.2.hook_resid_post"}},
      r"latents of blocks.0.hook_post_attn_resid.* eval.store .* holds blocks.0.hook_resid_post")],
)  # fmt: skip
def test_a_store_of_other_rows_of_the_same_examples_is_refused(world, tmp_path, changed, said):
    folder, _, saes, _ = world
    features = features_of(folder, saes, f"of other rows, {len(said)}")
    written(tmp_path)
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text()) | changed
    names = ("layers", "sites", "d_in", "dtype", "contrast")
    kept = {name: manifest[name] for name in names if manifest[name] is not None}
    StoreWriter(tmp_path / "x", KIND, "planted δ").finish(manifest["pieces"], kept, [EXAMPLES])
    words = (f"eval.features={features}", f"eval.store={tmp_path / 'x'}", f"run.dir={tmp_path}/r")
    with pytest.raises(MismatchError, match=said):
        run(load_config(EvalConfig, None, (*words, *FAST)))


def written_with_other_texts(folder):
    written(folder)
    path = folder / "x" / EXAMPLES
    lines = [{**one, "text": "other"} for one in fsio.read_lines(path)]
    fsio.commit_text(path, "".join(map(fsio.dump_json_line, lines)))
    manifest = json.loads((folder / "x" / "manifest.json").read_text())
    kept = {k: manifest[k] for k in ("layers", "sites", "d_in", "dtype", "contrast")}
    writer = StoreWriter(folder / "x", KIND, "planted δ")
    writer.finish(manifest["pieces"], kept, [EXAMPLES])
    return folder / "x"


def test_without_activations_the_report_says_what_to_set(world, tmp_path):
    folder, _, saes, _ = world
    features = features_of(folder, saes, "h")
    words = (
        f"eval.features={features}",
        f"run.dir={tmp_path}",
        "eval.baselines=false",
        "eval.layers=[0]",
    )
    found = run(load_config(EvalConfig, None, (*words, *FAST, "intervention.forward=false")))
    figures = found.figures["layers"]["0"]
    assert figures["latent_space"] is None
    assert "eval.store" in figures["latent_space_left_out"]
    assert "name them with eval.store" in (tmp_path / "summary.md").read_text()
    assert figures["fvu"] == 0.5, "what training measured"
