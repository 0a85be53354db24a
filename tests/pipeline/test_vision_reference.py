"""δ, its poolings and every figure of an evaluation against a reference that shares no code."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.metrics import roc_auc_score

import latent_reference as by_hand
import tiny_vlms
import vision_reference as reference
from saefty import harm_report, layers_report, silencing_report
from saefty.config import load_config
from saefty.fidelity import measure_fidelity
from saefty.saes.native import load_sae
from saefty.stages import eval as eval_stage
from saefty.stages import extract, train
from saefty.stores.activations import ActivationStore
from vision_data import write_memes

N, LAYERS = 32, (0, 2)
FAMILIES = ("llava", "qwen2_5_vl")
POOLINGS = ("text_only_mean", "eos", "last_k_mean", "span_mean")
CHAIN = ("llava", ("zero_attention", "per_layer"), "post_attn_resid", "text_only_mean")
TRAINED_K, GIVEN_K, D_SAE = 12, 10, 48
ALWAYS_ON, SILENT = range(3), range(3, 9)
PERMUTATIONS, FALSE_ALARMS, STRENGTH = 1000, 0.2, 1.5
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""Of differences of float32 states that are sums over three blocks, of size 1: 3.5e-6 was seen."""
NEAR = {"rel": 1e-5, "abs": 1e-6}
"""Of figures of latents, which the product keeps in float32 and the reference in float64."""
DRAWING = (harm_report, layers_report, silencing_report)


@dataclass
class World:
    """Memes, what the reference sees and computes of them, and where the commands write."""

    folder: Path
    table: Path
    records: list
    harmful: np.ndarray
    seen: dict
    deltas: dict

    def rows(self, family, contrast, part, pooling, layer):
        """Return the reference's rows of a layer, example after example."""
        return np.concatenate(
            [
                reference.pooled(delta[contrast][part, layer], seen, pooling, record["span"])
                for delta, seen, record in zip(
                    self.deltas[family], self.seen[family], self.records, strict=True
                )
            ]
        )

    def extracted(self, family, contrast, part, pooling, name):
        """Return the store that `extract` writes."""
        method, scope = contrast
        words = (
            f"model.name={tiny_vlms.folder_of(family)}", f"data.path={self.table}", "data.id=id",
            "data.prompt=instruction", "data.image=image_path", "data.label=sentiment",
            "data.harmful=[negative]", "data.span=span", f"extract.layers={list(LAYERS)}",
            f"extract.hook_point={part}", f"extract.contrast.method={method}",
            f"extract.contrast.scope={scope}", f"extract.pooling.name={pooling}",
            "extract.token_budget=512", f"run.dir={self.folder / name}",
        )  # fmt: skip
        cfg = load_config(extract.ExtractConfig, None, words)
        extract.run(cfg, model=tiny_vlms.load(family))
        return ActivationStore.open(self.folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    table = write_memes(folder, N, seed=7)
    records = [json.loads(line) for line in table.read_text().splitlines()]
    for i, record in enumerate(records):
        record["span"] = [20 + i % 5, 26 + i % 7]
    table.write_text("".join(json.dumps(record) + "\n" for record in records))
    harmful = np.array([record["sentiment"] == "negative" for record in records])
    made = World(folder, table, records, harmful, {}, {})
    for family in FAMILIES:
        model = reference.PlainModel(tiny_vlms.folder_of(family))
        made.seen[family] = [
            model.see(one["instruction"], folder / one["image_path"]) for one in records
        ]
        made.deltas[family] = [model.deltas(seen, LAYERS) for seen in made.seen[family]]
    return made


def stored(store, layer):
    return np.concatenate([part.numpy() for part in store.batches(layer, 50)])


def table_of(path):
    """Return a CSV file's rows, numbers as numbers."""
    with open(path, newline="") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("contrast", reference.CONTRASTS, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_tokens_row_is_the_difference_of_two_plain_passes(world, family, contrast):
    name = "-".join((family, *contrast))
    store = world.extracted(family, contrast, "post_attn_resid", "none", name)
    for layer in LAYERS:
        wanted = world.rows(family, contrast, "post_attn_resid", "none", layer)
        np.testing.assert_allclose(stored(store, layer), wanted, **ROUNDING)
    places = [reference.tokens_of(seen, "none") for seen in world.seen[family]]
    rows = store.rows()
    assert rows["token_pos"].tolist() == [place for part in places for place in part]
    assert rows["example"].tolist() == [i for i, part in enumerate(places) for _ in part]
    ids = [seen.inputs["input_ids"][0].numpy() for seen in world.seen[family]]
    assert rows["token_id"].tolist() == [
        one[place] for one, part in zip(ids, places, strict=True) for place in part
    ]


@pytest.mark.parametrize(
    ("family", "contrast", "part", "pooling"),
    [
        CHAIN,
        *((*CHAIN[:3], pooling) for pooling in POOLINGS[1:]),
        ("qwen2_5_vl", ("knockout", "joint"), "post_attn_resid", "text_only_mean"),
        ("qwen2_5_vl", ("knockout", "joint"), "post_mlp", "span_mean"),
        ("llava", ("knockout", "per_layer"), "post_attn_ln", "text_only_mean"),
    ],
)
def test_a_pooled_row_is_the_mean_over_the_tokens_it_is_said_to_be_of(
    world, family, contrast, part, pooling
):
    store = world.extracted(family, contrast, part, pooling, "-".join((family, part, pooling)))
    for layer in LAYERS:
        wanted = world.rows(family, contrast, part, pooling, layer)
        assert len(wanted) == N
        np.testing.assert_allclose(stored(store, layer), wanted, **ROUNDING)


@pytest.fixture(scope="module")
def rows(world):
    """The reference's pooled rows by layer; beside them lies the store `x` that `extract` wrote."""
    world.extracted(*CHAIN, "x")
    return {layer: world.rows(*CHAIN, layer) for layer in LAYERS}


@pytest.mark.parametrize("normalize", ["scalar", "per_dimension"])
def test_what_training_says_of_its_saes_is_what_the_files_give_by_hand(
    world, rows, tmp_path, normalize
):
    words = (
        f"train.store={world.folder / 'x'}", f"sae.k={TRAINED_K}", f"sae.d_sae={D_SAE}",
        f"sae.normalize={normalize}", "train.max_steps=20", "train.validation=0",
        f"run.dir={tmp_path}",
    )  # fmt: skip
    train.run(load_config(train.TrainConfig, None, words))
    for layer, x in rows.items():
        folder = tmp_path / f"layer_{layer}"
        scaler = json.loads((folder / "scaler.json").read_text())
        spread = x.std(axis=0)
        if normalize == "scalar":
            spread = np.full_like(spread, np.sqrt((spread**2).mean()))
        np.testing.assert_allclose(scaler["mean"], x.mean(axis=0), **ROUNDING)
        np.testing.assert_allclose(scaler["scale"], spread, **ROUNDING)
        sae = by_hand.PlainTopK.of(load_file(folder / "sae_weights.safetensors"), scaler, TRAINED_K)
        norms = np.linalg.norm(sae.weights["W_dec"], axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
        found = json.loads((folder / "metrics.json").read_text())
        for name, value in by_hand.fidelity(x, sae).items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
        # Every batch holds all rows, and the last steps hardly move: what is silent now was then.
        assert found["dead_share"] == found["silent_share"] > 0


@pytest.fixture(scope="module")
def saes(world, rows):
    """An SAE a layer with weights chosen here, written as SAELens writes one.

    Some latents fire on every row and some on none; how many of the others do differs by row.
    """
    made = {}
    for layer, x in rows.items():
        rng = np.random.default_rng(layer)
        W_dec = rng.normal(size=(D_SAE, x.shape[1]))
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
        b_enc = np.full(D_SAE, -0.6)
        b_enc[ALWAYS_ON], b_enc[SILENT] = 9.0, -50.0
        plain = {
            "W_enc": 0.8 * W_dec.T, "b_enc": b_enc, "W_dec": W_dec,
            "b_dec": -9.0 * W_dec[ALWAYS_ON].sum(axis=0),
        }  # fmt: skip
        mean, scale = x.mean(axis=0), x.std(axis=0)
        unit = float(np.sqrt((scale**2).mean()))
        made[layer] = by_hand.PlainTopK(mean, scale, unit, plain, GIVEN_K)
        folder = world.folder / "given" / f"layer_{layer}"
        folder.mkdir(parents=True)
        save_file(made[layer].folded(), folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(cfg_of(layer, x.shape[1])))
    return made


def cfg_of(layer, d_in):
    return {
        "architecture": "topk", "k": GIVEN_K, "rescale_acts_by_decoder_norm": False, "d_in": d_in,
        "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "hook_name": f"blocks.{layer}.hook_post_attn_resid",
            "contrast": {"method": "zero_attention", "scope": "per_layer"},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def latents(rows, saes):
    return {layer: saes[layer].encode(x) for layer, x in rows.items()}


@pytest.fixture(scope="module")
def evaluated(world, rows, saes):
    """Return what `eval` writes, by the method of the intervention: folder and figures."""
    made = {}
    for method, layers, words in (
        ("gate", LAYERS, ()),
        ("subtract", LAYERS[1:], (f"intervention.strength={STRENGTH}",)),
    ):
        words = (
            f"eval.sae={world.folder / 'given'}", f"eval.store={world.folder / 'x'}",
            f"eval.layers={list(layers)}", "eval.baselines=false", "eval.boots=100",
            f"eval.permutations={PERMUTATIONS}", "intervention.forward=false",
            f"intervention.method={method}", "intervention.counts=[1,3]",
            f"intervention.false_alarms={FALSE_ALARMS}", f"run.dir={world.folder / method}", *words,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for (
                module
            ) in DRAWING:  # pictures take most of the time, and hold no number of their own
                patch.setattr(module, "save_plot", lambda kind, data, path, **_: path)
            eval_stage.run(load_config(eval_stage.EvalConfig, None, words))
        figures = json.loads((world.folder / method / "summary.json").read_text())
        made[method] = world.folder / method, figures["layers"]
    return made


def test_an_saes_fidelity_and_activity_are_what_they_are_by_hand(world, rows, saes, evaluated):
    folder, figures = evaluated["gate"]
    texts = re.findall(
        r"Mean L0 (\S+); (\S+) % of the latents fire on no token here, (\S+) % on at least 99 %",
        (folder / "summary.md").read_text(),
    )
    beside = {int(row["layer"]): row for row in table_of(folder / "layers.csv")}
    for layer, text in zip(LAYERS, texts, strict=True):
        wanted = by_hand.fidelity(rows[layer], saes[layer])
        assert wanted["silent_share"] >= len(SILENT) / D_SAE
        assert wanted["always_on_share"] >= len(ALWAYS_ON) / D_SAE
        assert wanted["l0_mean"] < GIVEN_K
        found = figures[str(layer)]
        for one in (found["fvu"], beside[layer]["fvu"]):
            assert one == pytest.approx(wanted["fvu"], rel=1e-5)
        for one in (found["l0_mean"], beside[layer]["l0"]):
            assert one == pytest.approx(wanted["l0_mean"])
        shown = (wanted["l0_mean"], 100 * wanted["silent_share"], 100 * wanted["always_on_share"])
        for written, value in zip(text, shown, strict=True):
            assert abs(float(written) - value) <= 0.5001 * 10.0 ** -len(written.partition(".")[2])
        sae = load_sae(world.folder / "given" / f"layer_{layer}")
        batches = ActivationStore.open(world.folder / "x").batches(layer, 10)
        record = measure_fidelity(sae, batches).record()
        for name, value in wanted.items():
            assert record[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("layer", LAYERS)
def test_every_score_of_every_latent_is_what_it_is_by_hand(world, latents, evaluated, layer):
    folder, figures = evaluated["gate"]
    selection, report = by_hand.halves(world.harmful)
    z, harmful = latents[layer][selection], world.harmful[selection]
    scores = by_hand.latent_scores(z, harmful)
    found = {int(row["latent"]): row for row in table_of(folder / f"layer_{layer}.csv")}
    assert set(found) == set(np.flatnonzero(scores["fires"] > 0))
    for name, values in scores.items():
        for latent, row in found.items():
            assert row[name] == pytest.approx(values[latent], **NEAR), (name, latent)
    exact = by_hand.exact_maximum_p(z, harmful)
    for latent, row in found.items():
        spread = np.sqrt(exact[latent] * (1 - exact[latent]) / PERMUTATIONS)
        assert abs(row["max_p"] - exact[latent]) <= 4 * spread + 1 / PERMUTATIONS, latent
    chosen = [i for i in found if scores["auroc"][i] > 0.5]
    chosen.sort(key=lambda i: -scores["consensus"][i])
    reported = [one["latent"] for one in figures[str(layer)]["latents"]]
    assert reported == chosen == [i for i, row in found.items() if row["reported"] == "true"]
    check_report_half(latents[layer][report], world.harmful[report], chosen, found)


def check_report_half(z, harmful, chosen, found):
    p = np.array([by_hand.whitney(z[harmful, i], z[~harmful, i]) for i in chosen])
    for latent, one, adjusted in zip(chosen, p, by_hand.holm(p), strict=True):
        row, values = found[latent], z[:, latent]
        assert row["report_auroc"] == pytest.approx(roc_auc_score(harmful, values))
        frequencies = (values[mask] > 0 for mask in (harmful, ~harmful))
        assert row["report_dfreq"] == pytest.approx(np.subtract(*[f.mean() for f in frequencies]))
        assert row["p_report"] == pytest.approx(one, rel=1e-9)
        assert row["p_holm"] == pytest.approx(adjusted, rel=1e-9)
        gates = (row["q"], row["max_p"], adjusted)
        assert row["found"] == ("true" if max(gates) <= 0.05 else "false")


@pytest.mark.parametrize(("method", "layer"), [("gate", 0), ("gate", 2), ("subtract", 2)])
def test_what_gating_leaves_of_the_evidence_is_what_it_is_by_hand(
    world, rows, saes, latents, evaluated, method, layer
):
    folder, figures = evaluated[method]
    x, sae, z = rows[layer], saes[layer], latents[layer]
    selection, report = by_hand.halves(world.harmful)
    scores = by_hand.latent_scores(z[selection], world.harmful[selection])
    p = by_hand.exact_maximum_p(z[selection], world.harmful[selection])
    targets = [
        i for i in np.argsort(-scores["consensus"])
        if scores["auroc"][i] > 0.5 and scores["q"][i] <= 0.05 and p[i] <= 0.05
    ][:3]  # fmt: skip
    controls = by_hand.controls_of(targets, z, sae, scores["auroc"])
    curve = figures[str(layer)]["latent_space"]
    assert (curve["targets"], curve["controls"]) == (targets, controls)
    points = table_of(folder / "intervention" / f"layer_{layer}_latent_space.csv")
    arms = {"none": [], "target": targets, "control": controls}
    assert {(row["arm"], row["gated"]) for row in points} >= {("none", 0), ("target", 1)}
    strength = STRENGTH if method == "subtract" else 1.0
    for row in points:
        latents_out = arms[row["arm"]][: int(row["gated"])]
        assert len(latents_out) == row["gated"]
        gated = x - strength * sae.added(z, latents_out)
        wanted = by_hand.gating_figures(x, gated, world.harmful, selection, report, FALSE_ALARMS)
        assert curve["threshold"] == pytest.approx(wanted.pop("threshold"), rel=1e-3)
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, **NEAR), (row["arm"], row["gated"], name)
