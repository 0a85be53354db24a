"""Guards against the naive path, moved, reloaded, damaged and misused."""

import copy
import json
import shutil

import numpy as np
import pytest

import guard_cases
import tiny_models
from guard_cases import HARMFUL, TEXTS, make_guard, make_sae, naive_rows, spec_of
from planted_model import NAN, planted
from saefty import fsio
from saefty.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    MismatchError,
    SaeftyError,
    UnsafeArtifactError,
)
from saefty.guards.files import read_guard, save_guard
from saefty.guards.inputs import as_examples
from saefty.guards.place import check_place
from saefty.guards.report import measure
from saefty.guards.scoring import Verdicts, load_guard
from saefty.guards.spec import plain_text, reading_of
from saefty.linear import Linear
from saefty.metrics.intervals import Bootstrap
from saefty.records import Example, Message
from saefty.saes.native import save_sae
from saefty.tensorfile import TensorFile, pack

KINDS = ("words", "dense", "latents")
FEW = TEXTS[::6]
"""Six texts of unlike lengths."""
POOLED = [(kind, how) for kind in ("dense", "latents") for how in guard_cases.POOLS]


@pytest.fixture(scope="session")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """One guard of each kind; never written to."""
    folder = tmp_path_factory.mktemp("guards")
    return {kind: make_guard(folder / kind, kind, "max") for kind in KINDS}


@pytest.fixture
def copied(saved, tmp_path):
    """Return a function that copies a guard, to be damaged."""

    def copy_of(kind):
        return shutil.copytree(saved[kind], tmp_path / f"copy-of-{kind}")

    return copy_of


# What it scores


@pytest.mark.parametrize(("kind", "how"), POOLED)
def test_scores_are_those_of_a_naive_forward_pass(kind, how, model, tmp_path):
    guard = load_guard(make_guard(tmp_path / "guard", kind, how), model)
    rows = naive_rows(kind, how, make_sae() if kind == "latents" else None)
    by_hand = guard.linear
    expected = (rows[:, by_hand.columns] - by_hand.center) / by_hand.scale @ by_hand.weights
    assert guard.log_odds(TEXTS) == pytest.approx(expected + by_hand.bias, rel=1e-4, abs=1e-4)
    assert ((guard.score(TEXTS) > 0.5) == HARMFUL).mean() > 0.8  # it has learnt something


def test_scores_of_words_are_scikit_learns(saved):
    guard = load_guard(saved["words"])
    counts = np.zeros((len(TEXTS), len(guard.spec.vocabulary)))
    for row, text in enumerate(TEXTS):
        for word in text.lower().replace(",", " ").replace(".", " ").split():
            counts[row, guard.spec.vocabulary.index(word)] += 1
    assert guard.log_odds(TEXTS) == pytest.approx(guard.linear.score(counts), abs=1e-12)
    assert guard.score(["A ROBOT!"])[0] > 0.5 > guard.score(["bread"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_loaded_twice_gives_the_same_bytes(kind, saved, model):
    first, second = (load_guard(saved[kind], model).score(FEW) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_was_moved_needs_nothing_of_its_old_place(kind, tmp_path, model):
    here = make_guard(tmp_path / "here", kind)
    expected = load_guard(here, model).score(FEW)
    there = tmp_path / "elsewhere" / "another name"
    there.parent.mkdir()
    shutil.move(here, there)
    assert load_guard(there, model).score(FEW).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_do_not_matter(kind, saved, model):
    together = load_guard(saved[kind], model).log_odds(FEW)
    small = load_guard(saved[kind], model, token_budget=1)
    order = np.random.default_rng(0).permutation(len(FEW))
    mixed = small.log_odds([FEW[i] for i in order])
    assert mixed == pytest.approx(together[order], rel=1e-4, abs=1e-4)
    alone = [small.log_odds([text])[0] for text in FEW]
    assert alone == pytest.approx(together.tolist(), rel=1e-4, abs=1e-4)


def test_a_guard_loads_the_model_of_its_record(saved, model):
    assert load_guard(saved["dense"]).score(TEXTS[:3]) == pytest.approx(
        load_guard(saved["dense"], model).score(TEXTS[:3]), rel=1e-6
    )


def test_a_guard_of_words_loads_no_model(saved, monkeypatch):
    monkeypatch.setattr("saefty.guards.scoring.open_guard_model", None)
    assert np.isfinite(load_guard(saved["words"]).score(TEXTS)).all()


def test_texts_are_read_in_the_template_where_the_training_texts_were(tmp_path, model):
    guard = load_guard(make_guard(tmp_path / "guard", "dense", raw=False), model)
    bare = guard.log_odds(TEXTS[:4])
    examples = [Example(str(i), text) for i, text in enumerate(TEXTS[:4])]
    assert bare.tobytes() == guard.log_odds(examples).tobytes()
    raw = [Example(one.id, one.prompt, raw=True) for one in examples]
    assert (np.abs(bare - guard.log_odds(raw)) > 1e-3).all()


def test_only_the_tokens_of_training_are_read(tmp_path, model):
    spec = spec_of("dense", "last", tokens="prompt_end")
    plain = read_guard(make_guard(tmp_path / "plain", "dense", "last"))
    guard = load_guard(save_guard(tmp_path / "end", spec, plain.linear, plain.facts), model)
    texts = TEXTS[:6]
    asked = [Example(str(i), text, response=" Sure!", raw=True) for i, text in enumerate(texts)]
    expected = load_guard(tmp_path / "plain", model).log_odds(texts)
    assert guard.log_odds(asked) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_model_stops_behind_the_guards_site(saved, model, monkeypatch):
    seen = []
    capture = type(model).capture

    def watched(self, batch, sites, rows=None):
        seen.append(tuple(sites))
        return capture(self, batch, sites, rows)

    monkeypatch.setattr(type(model), "capture", watched)
    monkeypatch.setattr(type(model), "logits", None)
    load_guard(saved["latents"], model).score(TEXTS)
    assert set(seen) == {(guard_cases.SITE,)}


# Texts without a score


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_cannot_be_read_has_a_status_and_no_score(kind, saved, model):
    guard = load_guard(saved[kind], model)
    found = guard.judge(["", TEXTS[0], " \n", "half \ud83d", TEXTS[1]])
    assert found.statuses == ("empty", "ok", "empty", "not_text", "ok")
    assert np.isnan(found.probability[[0, 2, 3]]).all()
    assert found.log_odds[[1, 4]] == pytest.approx(guard.log_odds(TEXTS[:2]), rel=1e-4, abs=1e-4)


def test_a_text_that_is_too_long_has_no_score_unless_it_is_cut(saved, model):
    long = TEXTS[0] * 40
    assert load_guard(saved["dense"], model).judge([long]).statuses == ("too_long",)
    for side in ("left", "right"):
        cut = load_guard(saved["dense"], model, truncate=side).judge([long])
        assert cut.statuses == ("ok",)
    with pytest.raises(ConfigError, match="never, left, right, not 'end'"):
        load_guard(saved["dense"], model, truncate="end")


def test_a_conversation_that_the_template_refuses_spares_the_others(saved, model):
    talk = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    odd = Example("odd", "", messages=talk, raw=True)
    found = load_guard(saved["dense"], model).judge([TEXTS[0], odd, TEXTS[1]])
    assert found.statuses == ("ok", "refused", "ok")
    assert "3 turns" in found.reasons[1]


def test_activations_that_are_no_numbers_give_no_score(saved, model):
    broken = planted(model, [(1, "1", 3, NAN)])
    guard = load_guard(saved["dense"], broken)
    found = guard.judge(TEXTS[:4])
    assert found.statuses == ("ok", "nonfinite", "ok", "ok")
    expected = load_guard(saved["dense"], model).log_odds(TEXTS[:4])
    assert found.log_odds[[0, 2, 3]] == pytest.approx(expected[[0, 2, 3]], rel=1e-5)


def test_a_text_that_fails_in_the_forward_pass_spares_the_others(saved, model):
    twin = copy.copy(model)

    def capture(batch, sites, rows=None):
        if any(item.example.id == "2" for item in batch.items):
            raise RuntimeError("planted")
        return model.capture(batch, sites, rows=rows)

    twin.capture = capture
    found = load_guard(saved["latents"], twin).judge(TEXTS[:5])
    assert found.statuses == ("ok", "ok", "failed", "ok", "ok")
    assert found.reasons == {2: "RuntimeError: planted"}


def test_flags_are_refused_for_texts_without_a_score(saved):
    guard = load_guard(saved["words"])
    assert guard.flag(["a robot", "bread"]).tolist() == [True, False]
    with pytest.raises(InputError, match="1 of 2 texts cannot be read, first number 1"):
        guard.flag(["a robot", ""])


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_have_no_scores(kind, saved, model):
    assert load_guard(saved[kind], model).score([]).shape == (0,)


def test_one_bare_text_is_not_read_letter_by_letter(saved):
    assert load_guard(saved["words"]).score("a robot").shape == (1,)


def test_an_item_that_is_no_text_is_named():
    with pytest.raises(InputError, match=r"text 1 \(from 0\) is of the type NoneType"):
        as_examples(["a robot", None], raw=True)


def test_the_share_of_words_that_a_guard_does_not_know_is_told(saved):
    found = load_guard(saved["words"]).judge(["a robot", "a zeppelin", "Цеппелин летит", ""])
    assert found.unknown[:3].tolist() == [0.0, 0.5, 1.0]
    assert np.isnan(found.unknown[3])


# Thresholds


def test_a_threshold_is_a_probability_or_a_name(saved, model):
    guard = load_guard(saved["dense"], model)
    odds = guard.log_odds(TEXTS)
    assert (guard.flag(TEXTS) == (odds >= 0)).all()
    assert (guard.flag(TEXTS, "fpr_1pct") == (odds >= 1.5)).all()
    assert (guard.flag(TEXTS, 0.9) == (guard.score(TEXTS) >= 0.9)).all()
    assert guard.threshold == 0.5


@pytest.mark.parametrize("bad", ["high", "1.5", 0, 1, float("nan"), "-1"])
def test_a_threshold_that_is_none_is_refused_with_those_there_are(bad, saved):
    with pytest.raises(ConfigError, match=r"fpr_1pct \(0.8176\)"):
        read_guard(saved["dense"]).spec.threshold_of(bad)


# Models and SAEs that are not the guard's


def test_a_model_of_another_width_is_refused_with_both_widths(saved, tmp_path):
    wide = tiny_models.build("llama", tmp_path / "wide", hidden_size=48, head_dim=12)
    with pytest.raises(MismatchError, match=r"wide is 48 wide, but .*llama-float32, 32 wide"):
        load_guard(saved["dense"], str(wide)).score(TEXTS)


def test_a_model_of_other_weights_is_refused(saved, tmp_path):
    other = tiny_models.build("llama", tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"fitted on, .*: model.safetensors differs"):
        load_guard(saved["latents"], str(other)).score(TEXTS)


def test_a_model_that_is_gone_is_named_with_the_way_out(saved, tmp_path):
    record = json.loads((saved["dense"] / "guard.json").read_text())
    del record[fsio.SEAL]
    record["model"]["name"] = str(tmp_path / "gone")
    folder = shutil.copytree(saved["dense"], tmp_path / "guard")
    fsio.commit_sealed(folder / "guard.json", record)
    with pytest.raises(InputError, match="which cannot be had here") as caught:
        load_guard(folder).score(TEXTS)
    assert "--model FOLDER" in caught.value.then
    moved = str(tiny_models.folder_of("llama"))
    assert np.isfinite(load_guard(folder, moved).score(TEXTS)).all()


def test_an_sae_of_other_weights_is_refused_by_its_checksum(copied, model):
    folder = copied("latents")
    shutil.rmtree(folder / "sae")
    save_sae(make_sae(seed=1), folder / "sae")
    with pytest.raises(MismatchError, match="is not the one that this guard was fitted on"):
        load_guard(folder, model).score(TEXTS)


def test_an_sae_whose_bytes_changed_is_refused(copied, model):
    folder = copied("latents")
    path = folder / "sae" / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="does not have the bytes"):
        load_guard(folder, model).score(TEXTS)


def test_an_sae_of_the_hub_is_named_by_its_commit_and_not_copied(tmp_path, model, monkeypatch):
    sae = make_sae()
    sae.folder = tmp_path / "models--o--r" / "snapshots" / "abc123" / "layer_1"
    whole = read_guard(make_guard(tmp_path / "whole", "latents"))
    folder = save_guard(tmp_path / "guard", whole.spec, whole.linear, whole.facts, sae)
    assert not (folder / "sae").exists()
    asked = []

    def fetched(*place, **options):
        asked.append((*place, options))
        return make_sae(seed=len(asked) - 1)

    monkeypatch.setattr("saefty.guards.files.load_sae", fetched)
    expected = load_guard(tmp_path / "whole", model).score(TEXTS)
    assert load_guard(folder, model).score(TEXTS).tobytes() == expected.tobytes()
    assert asked == [("o/r", "layer_1", {"revision": "abc123"})]
    with pytest.raises(MismatchError, match="o/r is not the one"):
        load_guard(folder, model).score(TEXTS)


# Its folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_was_read_is_the_guard_that_was_saved(kind, saved):
    found = read_guard(saved[kind])
    assert found.spec == spec_of(kind, "max")
    assert found.facts == guard_cases.facts()


@pytest.mark.parametrize("kind", KINDS)
def test_saving_the_same_guard_again_changes_nothing(kind, tmp_path):
    folder = make_guard(tmp_path / "guard", kind, "max")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    make_guard(folder, kind, "max")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_guard_whose_writing_was_interrupted_is_finished(copied):
    folder = copied("latents")
    (folder / "guard.json").unlink()
    (folder / "guard.md").unlink()
    (folder / f"{fsio.TEMP_PREFIX}123-guard.json").write_text("half")
    with pytest.raises(ConfigError, match="it has no guard.json"):
        read_guard(folder)
    make_guard(folder, "latents", "max")
    assert read_guard(folder).spec.reads == "latents"


def test_another_guards_folder_is_left_alone(copied):
    folder = copied("dense")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"another guard; they differ in reads, .*files"):
        make_guard(folder, "dense", "mean")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a guard: notes.txt"):
        make_guard(tmp_path, "words")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="is a file, and a guard is a folder"):
        make_guard(tmp_path / "notes.txt", "words")


def test_a_place_is_refused_before_any_work_unless_the_run_itself_wrote_there(copied, tmp_path):
    folder = copied("words")
    with pytest.raises(ConfigError, match="which this run did not write"):
        check_place(folder, tmp_path / "run")
    rewrite(folder, lambda record: record["facts"].update(run=str(tmp_path / "run")))
    check_place(folder, tmp_path / "run")
    check_place(tmp_path / "new", tmp_path / "run")
    with pytest.raises(ConfigError, match="something else than a guard: copy-of-words"):
        check_place(tmp_path, tmp_path / "run")


def test_the_card_says_what_was_measured_and_where_it_ends(saved):
    page = (saved["latents"] / "guard.md").read_text()
    for said in (
        "Latents of an SAE at blocks.1.hook_resid_post",
        "the largest over tokens that are not special",
        "AUROC 0.910 [0.840, 0.970]",
        "forum 0.700 [0.600, 0.800]",
        "`fpr_1pct`: 0.8176 (log-odds 1.5",
        "in this folder, under `sae/`",
        "not calibrated",
        "from `default` on: harmful examples that are flagged 0.800 [0.600, 0.900]",
        "harmless examples that are flagged 0.100 [0.050, 0.300]",
        "the best F1 on training examples, each scored by a fit that left its fold out, and not by "
        "this guard",
        "never below the default",
        "left out of the fit (measured with another probe)",
    ):
        assert said in page


@pytest.mark.parametrize(
    ("folder", "what"),
    [("nowhere", "no such folder"), ("empty", "but nothing"), ("file", "is a file")],
)
def test_a_place_without_a_guard_is_named(folder, what, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=what) as caught:
        load_guard(tmp_path / folder)
    assert "saefty probe --save" in caught.value.then


# Files that lie


def test_a_record_that_was_edited_says_what_to_do(copied):
    path = copied("words") / "guard.json"
    path.write_text(path.read_text().replace("a probe of the tests", "a better probe"))
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        read_guard(path.parent)
    assert "Copy the guard's folder again" in caught.value.then


def test_a_guard_without_hashes_of_its_texts_says_what_to_do(copied):
    folder = copied("words")
    replace_arrays(folder, fitted_on=None)
    with pytest.raises(IntegrityError, match="another version of saefty wrote it") as caught:
        read_guard(folder)
    assert "saefty probe --save" in caught.value.then


def rewrite(folder, change) -> None:
    """Change a guard's record and seal it again, as a stranger could."""
    record = fsio.read_sealed(folder / "guard.json")
    change(record)
    fsio.commit_sealed(folder / "guard.json", record)


def replace_arrays(folder, **arrays) -> None:
    """Put other arrays into a guard's weights, with the checksum that belongs to them."""
    file = TensorFile(folder / "guard.safetensors")
    held = {name: np.array(file.array(name)) for name in file.names}
    data = pack({k: v for k, v in {**held, **arrays}.items() if v is not None}, {"format": "np"})
    put_weights(folder, data)


def put_weights(folder, data: bytes) -> None:
    checksum = fsio.commit_bytes(folder / "guard.safetensors", data)
    rewrite(folder, lambda record: record["files"].update({"guard.safetensors": checksum}))


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors", "vocabulary.txt"])
def test_a_changed_byte_is_found(name, copied):
    path = copied("words") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        read_guard(path.parent)


@pytest.mark.parametrize("name", ["guard.safetensors", "vocabulary.txt"])
def test_a_missing_file_is_named(name, copied):
    folder = copied("words")
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        read_guard(folder)


def test_a_guard_of_a_newer_saefty_is_refused_with_both_versions(copied):
    folder = copied("words")
    rewrite(folder, lambda record: record.update(version=2, saefty="9.0"))
    with pytest.raises(MismatchError, match=r"version 2, written by saefty '9.0'.*version 1"):
        read_guard(folder)


def leaves(tree, at=()):
    """Yield the path of every key of a record."""
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from leaves(value, (*at, key))


def changed(tree, path, change):
    for key in path[:-1]:
        tree = tree[key]
    change(tree, path[-1])


FREE = {("facts", "data"), ("facts", "sources"), ("facts", "left_out"), ("facts", "rates")}
"""Objects whose keys are a user's own names."""


def test_a_record_without_one_of_its_keys_is_refused(copied, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    folder = copied("latents")
    whole = fsio.read_sealed(folder / "guard.json")
    tried = 0
    for path in leaves(whole):
        if any(path[: len(free)] == free and len(path) > len(free) for free in FREE):
            continue
        if path[:2] == ("model", "files") and len(path) > 2:
            continue
        record = copy.deepcopy(whole)
        changed(record, path, lambda tree, key: tree.pop(key))
        fsio.commit_sealed(folder / "guard.json", record)
        with pytest.raises(IntegrityError):
            read_guard(folder)
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("bad", [None, [], {}, "text", -7, 1e308, True, "é" * 99])
def test_a_record_with_any_value_changed_is_read_or_refused_but_never_a_crash(
    bad, copied, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda _: None)
    folder = copied("latents")
    whole = fsio.read_sealed(folder / "guard.json")
    for path in leaves(whole):
        record = copy.deepcopy(whole)
        changed(record, path, lambda tree, key: tree.update({key: bad}))
        fsio.commit_sealed(folder / "guard.json", record)
        try:
            read_guard(folder)
        except SaeftyError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1 << 19).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"[" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        b"\x80\x04K\x01.",
    ],
    ids=["empty", "short", "huge", "beyond", "nested", "list", "nothing", "pickle"],
)
def test_bytes_that_are_no_safetensors_are_refused(data, copied):
    folder = copied("dense")
    put_weights(folder, data)
    with pytest.raises(IntegrityError):
        read_guard(folder)


def with_header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 64


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64", "shape": [1 << 60], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [1], "data_offsets": [0, 1 << 40]},
        {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]},
        {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": "1", "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [1]},
        [],
    ],
)
def test_headers_that_lie_are_refused(entry, copied):
    folder = copied("dense")
    whole = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    columns = {**whole, "dtype": "I64"}
    put_weights(
        folder,
        with_header({"columns": columns, "center": whole, "scale": whole, "weights": entry}),
    )
    with pytest.raises(IntegrityError):
        read_guard(folder)


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"weights": np.full(32, np.nan)}, "32 of 32 values of weights are NaN"),
        ({"scale": np.zeros(32)}, "a scale is 0.0"),
        ({"columns": np.arange(-1, 31)}, "columns -1 to 30 do not lie"),
        ({"columns": np.arange(5, 37)}, "columns 5 to 36 do not lie"),
        ({"columns": np.arange(32)[::-1].copy()}, "do not lie in range|not ascending"),
        ({"columns": np.arange(32.0)}, "columns is float64 of the shape"),
        ({"weights": np.zeros(32, np.float32)}, "weights is float32"),
        ({"weights": np.zeros((32, 1))}, "and a row of float64 is wanted"),
        ({"weights": np.zeros(31)}, "there are 32 columns, but 31 of weights"),
        ({"weights": None}, "holds no array 'weights'"),
    ],
)
def test_weights_that_make_no_detector_are_refused(arrays, what, copied):
    folder = copied("dense")
    replace_arrays(folder, **arrays)
    with pytest.raises(IntegrityError, match=what):
        read_guard(folder)


def test_a_vocabulary_of_another_length_is_refused(copied):
    folder = copied("words")
    checksum = fsio.commit_text(folder / "vocabulary.txt", "one\ntwo\n")
    rewrite(folder, lambda record: record["files"].update({"vocabulary.txt": checksum}))
    with pytest.raises(IntegrityError, match="holds 2 words, but the guard reads 28 columns"):
        read_guard(folder)


def test_a_record_too_large_to_be_one_is_not_read(copied):
    path = copied("words") / "guard.json"
    with open(path, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(IntegrityError, match="no guard's record has more than"):
        read_guard(path.parent)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a": NaN}', '"guard"'])
def test_a_record_that_is_no_object_is_refused(text, copied):
    path = copied("words") / "guard.json"
    path.write_text(text)
    with pytest.raises(IntegrityError):
        read_guard(path.parent)


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors", "vocabulary.txt"])
def test_a_link_out_of_the_folder_is_refused(name, copied, tmp_path):
    folder = copied("words")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UnsafeArtifactError):
        read_guard(folder)


def test_a_link_to_an_sae_outside_is_refused(copied, tmp_path, model):
    folder = copied("latents")
    (folder / "sae").rename(tmp_path / "sae")
    (folder / "sae").symlink_to(tmp_path / "sae")
    with pytest.raises(UnsafeArtifactError):
        load_guard(folder, model).score(TEXTS)


# What it is made of


def test_parts_of_different_width_are_not_saved_together(tmp_path, saved):
    linear = Linear(np.arange(2), np.zeros(2), np.ones(2), np.ones(2), 0.0, 7)
    with pytest.raises(ValueError, match="reads 7 columns, but there are 32 of dense"):
        save_guard(tmp_path / "guard", spec_of("dense"), linear, guard_cases.facts())
    with pytest.raises(ValueError, match="a guard of latents takes an SAE"):
        save_guard(tmp_path / "guard", spec_of("latents"), linear, guard_cases.facts())
    assert not (tmp_path / "guard").exists()


def test_words_are_counted_in_what_was_written():
    talk = (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "hello"))
    assert plain_text(Example("1", "hi", response="hello")) == "hi\nhello"
    assert plain_text(Example("1", "", messages=talk)) == "be kind\nhi\nhello"
    assert plain_text(Example("1", "", messages=talk, response="hello")) == "be kind\nhi\nhello"
    assert plain_text(Example("1", "", messages=talk[:2], response="hi")) == "be kind\nhi\nhi"


def test_bare_texts_are_read_as_most_training_texts_were():
    raw = [Example(str(i), "text", raw=i < 6) for i in range(10)]
    assert reading_of(raw) == {"raw": True, "with_response": False}
    answered = [Example(str(i), "text", response="so" if i < 4 else None) for i in range(6)]
    assert reading_of(answered) == {"raw": False, "with_response": True}


def test_measures_are_by_hand_on_the_labelled_texts_alone():
    labels = [True, True, False, False, None, True]
    examples = [Example(str(i), "text", label=label) for i, label in enumerate(labels)]
    odds = np.array([3.0, -1.0, 1.0, -2.0, 5.0, np.nan])
    found = measure(examples, Verdicts(odds, ("ok",) * 5 + ("too_long",), {}, np.zeros(6)), 0.0)
    assert (found["texts"], found["scored"], found["flagged"]) == (6, 5, 3)
    assert found["not_scored"] == {"too_long": 1}
    assert (found["labelled"], found["harmful"]) == (4, 2)
    assert found["auroc"]["estimate"] == 0.75
    assert found["recall"]["estimate"] == 0.5
    assert found["false_positive_rate"]["estimate"] == 0.5
    wilson = Bootstrap(2).mean(np.array([1.0, 0.0]))
    assert found["recall"]["low"] == pytest.approx(wilson.low)


def test_labels_of_one_kind_give_no_auroc():
    examples = [Example(str(i), "text", label=True) for i in range(3)]
    found = measure(
        examples, Verdicts(np.array([1.0, 2.0, -1.0]), ("ok",) * 3, {}, np.zeros(3)), 0.0
    )
    assert found["auroc"] is None
    assert found["recall"]["estimate"] == pytest.approx(2 / 3)
    assert found["false_positive_rate"] is None


def test_intervals_drawn_in_blocks_are_those_of_one_bootstrap(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.random(600) < 0.4
    odds = rng.normal(size=600) + labels
    examples = [
        Example(str(i), "text", label=bool(one), group=f"g{i // 2}") for i, one in enumerate(labels)
    ]
    verdicts = Verdicts(odds, ("ok",) * 600, {}, np.zeros(600))
    whole = measure(examples, verdicts, 0.5)
    held = []

    class Watched(Bootstrap):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            held.append(self.weights.size)

    monkeypatch.setattr("saefty.guards.report.Bootstrap", Watched)
    monkeypatch.setattr("saefty.guards.report.BLOCK_VALUES", 600 * 30)
    blocks = measure(examples, verdicts, 0.5)
    assert max(held) == 600 * 30
    assert len(held) == 3 * 34  # three measures of 1000 draws, 30 at a time
    for name in ("auroc", "recall", "false_positive_rate"):
        assert blocks[name]["estimate"] == whole[name]["estimate"]
        assert blocks[name]["method"] == whole[name]["method"]
        width = whole[name]["high"] - whole[name]["low"]
        for end in ("low", "high"):
            assert blocks[name][end] == pytest.approx(whole[name][end], abs=0.1 * width)


def test_blocks_keep_the_exact_interval_of_a_ranking_without_an_error(monkeypatch):
    labels = [i % 2 == 0 for i in range(20)]
    examples = [Example(str(i), "text", label=one) for i, one in enumerate(labels)]
    verdicts = Verdicts(np.where(labels, 1.0, -1.0), ("ok",) * 20, {}, np.zeros(20))
    whole = measure(examples, verdicts, 0.0)
    monkeypatch.setattr("saefty.guards.report.BLOCK_VALUES", 20)
    assert measure(examples, verdicts, 0.0) == whole
    assert "Newcombe" in whole["auroc"]["method"]
