"""`saefty tokens` from its config file to the JSONL tree and pictures."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from saefty import interrupts, sentences
from saefty.config import load_config
from saefty.errors import ConfigError, InputError, MismatchError, UnknownNameError
from saefty.records import Site
from saefty.runs import RunSection
from saefty.sentence_views import SentenceViews
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, commit_features
from saefty.stores.index import build_index
from token_place import FIRST, SECOND, K, Place


def reference(place: Place, layer: int) -> list[list[dict]]:
    """Return the tree's records one sentence and token at a time, by transformers and NumPy."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    weights = load_file(place.saes / f"layer_{layer}" / "sae_weights.safetensors")
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    found = []
    for text in FIRST + SECOND:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        assert ids[0] == tokenizer.bos_token_id
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        x = states[layer + 1][0].numpy().astype(np.float64)
        lines = []
        for position in range(1, len(ids)):
            pre = x[position] @ weights["W_enc"] + weights["b_enc"]
            order = [i for i in np.argsort(-pre)[:K] if pre[i] > 0]
            lines.append(
                {"pos": position, "span": offsets[position], "ids": order, "vals": pre[order]}
            )
        found.append(lines)
    return found


@pytest.mark.parametrize("layer", [0, 1])
def test_the_seeds_config_gives_the_seeds_tree_as_a_naive_program_computes_it(place, run, layer):
    wanted = reference(place, layer)
    files = sorted((run / f"layer_{layer:02d}").iterdir())
    assert [one.name for one in files] == [f"sentence_{i:04d}.jsonl" for i in range(7)]
    for file, text, tokens in zip(files, FIRST + SECOND, wanted, strict=True):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == len(tokens)
        for line, token in zip(lines, tokens, strict=True):
            assert list(line) == ["token_pos", "token_str", "nnz", "feat_ids", "feat_vals"]
            assert line["token_pos"] == token["pos"]
            assert line["nnz"] == len(token["ids"])
            assert line["feat_ids"] == token["ids"]
            np.testing.assert_allclose(line["feat_vals"], token["vals"], rtol=1e-5)
            shown = text[slice(*token["span"])]
            if "<" not in line["token_str"]:
                assert line["token_str"].strip() == shown.strip()
            else:
                assert not shown.isascii()  # only parts of a character are shown as bytes


def test_parts_of_a_character_are_shown_as_bytes_that_make_up_the_text(run):
    lines = (run / "layer_00" / "sentence_0003.jsonl").read_text(encoding="utf-8").splitlines()
    spelt = [json.loads(line)["token_str"] for line in lines]
    assert spelt[:3] == ["<E6>", "<9D>", "<B1>"]
    assert "\ufffd" not in "".join(spelt)
    data = b"".join(bytes.fromhex(one[1:-1]) for one in spelt)
    assert data.decode() == FIRST[3]


def test_the_run_holds_a_feature_store_and_pictures(run):
    assert SentenceViews(run).store.layers == (0, 1)
    pictures = {path.relative_to(run).as_posix() for path in (run / "pictures").rglob("*.*")}
    wanted = {
        f"pictures/layer_{layer:02d}/{name}.{suffix}"
        for layer in (0, 1)
        for name in ["nnz", "sentence_0000"]
        for suffix in ("png", "svg")
    }
    # A sentence of many tokens goes on in a second picture.
    assert wanted <= pictures
    assert all("_2." in name or "_3." in name for name in pictures - wanted)


def test_the_same_command_resumes_and_other_settings_are_refused(place, run):
    before = {p: p.stat().st_mtime_ns for p in (run / "features").rglob("*.safetensors")}
    words = ["output.jsonl=true", "pictures.sentences=0", f"run.dir={run}"]
    again = sentences.run(place.config(*words))
    assert again.folder == run
    assert before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(MismatchError, match=r"encode.layers"):
        sentences.run(place.config(f"run.dir={run}", "layers=[1]"))


@pytest.mark.parametrize("layers", ["all", "null", "[2,0,1]"])
def test_layers_left_out_or_all_are_every_layer_that_has_an_sae(place, layers):
    cfg = place.config(f"layers={layers}")
    sources, ids, found = sentences._saes(cfg.encode)
    assert found == (0, 1, 2) and ids is None
    assert [Path(one).name for one in sources] == ["layer_0", "layer_1", "layer_2"]


def test_a_release_is_read_one_sae_a_layer(place):
    text = (place.folder / "config.yaml").read_text(encoding="utf-8")
    (place.folder / "release.yaml").write_text(
        text.replace(
            f'sae_path: "{place.saes}/layer_{{layer}}"', 'sae_release: "llama_scope_lxr_8x"'
        )
    )
    cfg = load_config(sentences.TokensConfig, place.folder / "release.yaml")
    assert sentences._saes(cfg.encode) == (("llama_scope_lxr_8x",), ("l0r_8x", "l1r_8x"), (0, 1))
    every = load_config(sentences.TokensConfig, place.folder / "release.yaml", ["layers=all"])
    assert sentences._saes(every.encode)[2] == tuple(range(32))
    beyond = load_config(sentences.TokensConfig, place.folder / "release.yaml", ["layers=[31,32]"])
    with pytest.raises(MismatchError, match=r"no SAE of layers \[32\]"):
        sentences._saes(beyond.encode)
    many = load_config(
        sentences.TokensConfig, place.folder / "release.yaml", ["sae_release=gemma-scope-2b-pt-res"]
    )
    with pytest.raises(ConfigError, match="SAEs of layer 0: ") as error:
        sentences._saes(many.encode)
    assert "sae_id=" in error.value.then


def test_a_layer_without_a_folder_names_those_that_have_one(place):
    with pytest.raises(
        UnknownNameError, match=r"no folder .*layer_7; .* leads to layers \[0, 1, 2"
    ):
        sentences.run(place.config("layers=[0,7]"))
    with pytest.raises(UnknownNameError, match="no folder at all"):
        sentences.run(place.config("sae_path=nowhere/{layer}/sae"))
    assert not (place.folder / "outputs").exists() or not list((place.folder / "outputs").iterdir())


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("input_csv=[a.csv]", "input_csvs"),
        ("sae_realease=x", "sae_release"),
        ("axcols=2", "ax_cols"),
        ("output.json=true", "output.jsonl"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(place, word, nearest):
    with pytest.raises(ConfigError, match=rf"no such key.*{nearest}"):
        load_config(sentences.TokensConfig, place.folder / "config.yaml", [word])


def test_a_real_csv_is_chosen_explicitly_and_its_columns_are_used(place):
    path = place.folder / "data" / "table.csv"
    path.write_text('sentence_id,category,sentence\ns1,geo,"Yes, it is."\ns2,math,1 + 1 = 2\n')
    given = [f"input_csvs=[{path}]", "layers=[0]", "pictures.sentences=1", "run.dir=csv",
             "pictures.formats=[svg]"]  # fmt: skip
    with pytest.raises(InputError, match="header of a CSV") as error:
        sentences.run(place.config(*given))
    assert "data.format=csv data.text=sentence" in error.value.then
    assert not Path("csv").exists()
    outcome = sentences.run(place.config(*given, "data.format=csv", "data.text=sentence"))
    views = SentenceViews(outcome.folder)
    assert [one["example_id"] for one in views.examples] == ["s1", "s2"]
    assert [one["group"] for one in views.examples] == ["geo", "math"]
    assert views.text_of(0) == "Yes, it is."
    with pytest.raises(InputError) as error:
        sentences.run(place.config("data.format=csv", "data.text=sentence"))
    assert "data.format=lines" in error.value.then


def test_a_sentence_that_is_too_long_is_counted_and_the_others_are_read(place):
    path = place.folder / "data" / "long.csv"
    path.write_text("Yes.\n" + "the fox and the dog " * 60 + "\nNo.\n")
    outcome = sentences.run(
        place.config(f"input_csvs=[{path}]", "layers=[0]", "pictures.sentences=0",
                     "output.jsonl=true", "run.dir=long")
    )  # fmt: skip
    assert outcome.figures["ledger"]["skipped"] == {"too_long": 1}
    files = sorted(p.name for p in (outcome.folder / "layer_00").iterdir())
    assert files == ["sentence_0000.jsonl", "sentence_0002.jsonl"]
    with pytest.raises(InputError, match="sentence 1 .* has no tokens"):
        SentenceViews(outcome.folder).sentence(0, 1)


def test_an_interrupted_run_is_resumed_by_its_own_folder(place, monkeypatch):
    monkeypatch.setattr(interrupts, "resumable", None)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sentences, "_draw", stopped)
        with pytest.raises(KeyboardInterrupt):
            sentences.run(place.config("layers=[0]", "output_dir=stopped"))
    (folder,) = Path("stopped").iterdir()
    assert interrupts.resumable == folder
    words = ["layers=[0]", "pictures.sentences=0", f"run.dir={folder}"]
    assert sentences.run(place.config(*words)).folder == folder
    assert (folder / "pictures" / "layer_00" / "nnz.png").exists()


@pytest.mark.parametrize("name", ["configs/tokens.yaml", "docs/tokens.md", "docs/tokens.ja.md"])
def test_the_shipped_configurations_load(name, tmp_path):
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        text = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    cfg = load_config(sentences.TokensConfig, tmp_path / "config.yaml")
    assert (cfg.model.name, cfg.model.dtype) == ("meta-llama/Llama-3.1-8B", "float16")
    assert cfg.data.files == ("data/sentences1.csv", "data/sentences2.csv")
    assert cfg.run.root == Path("outputs")
    sources, ids, layers = sentences._saes(cfg.encode)
    assert sources == ("llama_scope_lxr_8x",)
    assert ids == tuple(f"l{layer}r_8x" for layer in layers)


def test_fifty_starts_in_one_second_have_fifty_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "run_20260131_120000")
    section = RunSection(root=tmp_path / "outputs")
    with ThreadPoolExecutor(10) as pool:
        folders = list(pool.map(lambda _: sentences.run_folder(section), range(50)))
    names = {folder.name for folder in folders}
    wanted = {"run_20260131_120000", *(f"run_20260131_120000-{n}" for n in range(1, 50))}
    assert names == wanted


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no run: thesis.txt"):
        sentences.run_folder(RunSection(dir=tmp_path))


def test_files_do_not_grow_with_the_sentences(tmp_path, monkeypatch):
    """A store of 10^5 sentences and 32 layers, as encode writes it, and its pictures."""
    n, layers, pieces = 100_000, range(32), 2
    folder = tmp_path / "run" / "features"
    folder.mkdir(parents=True)
    line = '{{"example_id": "{0}", "text": "a", "group": null, "status": "ok"}}\n'
    (folder / EXAMPLES).write_text("".join(line.format(i) for i in range(n)))
    writer = StoreWriter(folder, KIND, "x")
    per = n // pieces
    code = {
        "indptr": np.arange(per + 1),
        "ids": np.arange(per, dtype=np.uint32) % 8,
        "values": np.ones(per, np.float32),
    }
    records = []
    for piece in range(pieces):
        rows = {name: np.ones(per, kind) for name, kind in ROW_COLUMNS.items()}
        rows["example"] = np.arange(per, dtype=np.int64) + piece * per
        rows["char_start"] = np.zeros(per, np.int32)
        records.append(commit_features(writer, piece, dict.fromkeys(layers, code), rows, {}))
    facts = {
        "layers": list(layers),
        "sites": {str(i): Site(i).name for i in layers},
        "d_sae": {str(i): 8 for i in layers},
    }
    indices = [build_index(folder, i, pieces, 8) for i in layers]
    writer.finish(records, facts, [EXAMPLES, *indices])

    def touch(plot, data, path, **_):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(sentences, "save_plot", touch)
    # The checks of types in tests make each call of the real one cost a millisecond.
    monkeypatch.setattr("saefty.fsio.parse_json", lambda text, _: json.loads(text))
    section = sentences.PicturesSection()
    views = SentenceViews(tmp_path / "run")
    written = sentences._draw(views, section)
    assert written == 32 * (section.sentences + 1) * 2
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    # A layer: two shards, an index, pictures; and a few files beside. Nothing a sentence.
    assert len(files) <= 32 * (pieces + 1) + written + 2 * pieces + 4
    assert len(files) < 1000 < n
