"""`saefty annotate` against one sample at a time by hand, and what a file keeps."""

import json
from pathlib import Path

import pytest

import tiny_models
from annotating import annotate, entries, made_model, write
from annotation_truth import (
    Naive,
    NaiveWords,
    compare,
    results,
    samples,
    save_random_sae,
    without_ours,
)
from saefty.annotation.entries import error_of
from saefty.models.base import load_model
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World
from test_pieces import poisoned

COUNT = 200


@pytest.mark.parametrize(
    ("family", "arch"), [("gemma2", "jumprelu"), ("llama", "topk"), ("qwen3", "relu")]
)
def test_annotate_equals_one_sample_at_a_time_by_hand(family, arch, tmp_path):
    folder = made_model(family, tmp_path / family, arch)
    made = samples(COUNT)
    source = write(results(made), indent=2)
    annotate("--input", source, "--model", folder / "model", "--sae", folder / "layer_1" / "sae",
             "--dtype", "float32", "--top-k", 5, "--output", "out.json")  # fmt: skip
    naive = Naive(folder / "model", folder / "layer_1" / "sae", 1)
    true = [naive.entry(one["prompt"], one["response"], 5, every=False) for one in made]
    found = entries(Path("out.json"), "layer_1")
    for ours, theirs in zip(found, true, strict=True):
        compare(ours, theirs)
    assert any("boundary_token_straddles" in one for one in true)
    assert sum(one["activations"]["last_token"]["num_active_features"] for one in found) > COUNT
    assert without_ours(Path("out.json").read_bytes()) == source.read_bytes()


def test_all_tokens_of_the_sandbox_model_equal_those_by_hand(tmp_path):
    sae = save_random_sae(tmp_path / "sae", 2, "topk", 128)
    requests = [one.example(response=True) for one in World(0).requests(COUNT, seed=1)]
    made = [{"prompt": one.prompt + " ", "response": one.response} for one in requests]
    made[0] = {"prompt": "darf ich den brun", "response": "nen schützen ?"}  # one word, cut in two
    source = write(results(made))
    annotate("--input", source, "--model", MODEL_FOLDER, "--sae", sae, "--dtype", "float32",
             "--save-all-tokens", "--output", "out.json")  # fmt: skip
    naive = NaiveWords(MODEL_FOLDER, sae, 2)
    found = entries(Path("out.json"), "layer_2")
    for one, ours in zip(made, found, strict=True):
        compare(ours, naive.entry(one["prompt"], one["response"], 50, every=True))
    assert found[0]["boundary_token_straddles"] and found[0]["answer_start_position"] == 3
    assert without_ours(Path("out.json").read_bytes()) == source.read_bytes()


def test_the_command_of_the_seed_takes_a_release_that_is_a_folder(gemma):
    source = write(results(samples(6)), indent=2)
    printed = annotate("--input", source, "--model", gemma / "model", "--sae-release", gemma,
                       "--sae-id", "layer_1/sae", "--target-layer", 1, "--max-samples", 4,
                       "--hook-name", "blocks.1.hook_resid_post", "--verbose")  # fmt: skip
    output = next(Path().glob("in_sae_*.json"))
    assert printed.splitlines()[0] == str(output)
    assert printed.splitlines()[-1] == "in 6 = ok 4 + skipped 2 (max_samples 2) + failed 0"
    value = json.loads(output.read_text())
    assert value["sae_extraction_metadata"] == {
        "layer_1": {"sae_id": "layer_1/sae", "sae_release": str(gemma),
                    "hook_name": "blocks.1.hook_resid_post", "top_k_features": 50}
    }  # fmt: skip
    variations = [one for q in value["results"] for one in q["variations"]]
    assert ["sae_activations" in one for one in variations] == [True] * 4 + [False] * 2


def test_two_layers_at_once_equal_two_runs_one_after_the_other(gemma):
    source = write(results(samples(20)), indent="\t")
    model, one, two = gemma / "model", gemma / "layer_1" / "sae", gemma / "layer_2" / "sae"
    annotate("--input", source, "--model", model, "--layers", "1,2", "--sae", f"{one},{two}",
             "--output", "both.json")  # fmt: skip
    annotate("--input", source, "--model", model, "--sae", one, "--output", "first.json")
    annotate("--input", "first.json", "--model", model, "--sae", two, "--output", "second.json")
    assert Path("second.json").read_bytes() == Path("both.json").read_bytes()
    annotate("--input", "second.json", "--model", model, "--sae", one, "--output", "again.json")
    assert Path("again.json").read_bytes() == Path("both.json").read_bytes()


def test_a_second_sae_of_a_layer_has_a_key_with_its_name(gemma, tmp_path):
    other = save_random_sae(tmp_path / "other", 1, "topk", tiny_models.D_MODEL, d_sae=64)
    source = write(results(samples(4)))
    model, one = gemma / "model", gemma / "layer_1" / "sae"
    annotate("--input", source, "--model", model, "--layers", "1,1", "--sae", f"{one},{other}",
             "--output", "both.json")  # fmt: skip
    annotate("--input", source, "--model", model, "--sae", one, "--output", "a.json")
    annotate("--input", "a.json", "--model", model, "--sae", other, "--output", "b.json")
    annotate("--input", source, "--model", model, "--sae", other, "--output", "c.json")
    assert Path("b.json").read_bytes() == Path("both.json").read_bytes()
    assert entries(Path("b.json"), f"layer_1__{other}") == entries(Path("c.json"), "layer_1")


def test_a_sample_that_fails_says_why_and_the_others_go_on(gemma):
    good = {"prompt": "how do I bake", "response": " bread"}
    made = [
        good,
        {"prompt": "", "response": "r"},
        {"prompt": "p", "response": ""},
        {"response": "r"},
        {"prompt": "p", "response": None},
        {"prompt": "word " * 300, "response": "r"},
        {"prompt": "half \ud83d", "response": "r"},
        good,
    ]
    source = Path("in.json")
    source.write_text(json.dumps(results(made)))
    printed = annotate("--input", source, "--model", gemma / "model", "--sae",
                       gemma / "layer_1" / "sae", "--output", "out.json")  # fmt: skip
    assert printed.splitlines()[-1] == (
        "in 8 = ok 2 + skipped 0 + failed 6 (empty_prompt 1, empty_response 1, half_character 1, "
        "no_prompt 1, response_not_text 1, too_long 1)"
    )
    found = entries(Path("out.json"), "layer_1")
    assert [one["status"] for one in found] == ["success", *["error"] * 6, "success"]
    tokens = found[5]["total_tokens"]
    assert found[5]["error"] == (
        f"too_long: prompt and response have {tokens} tokens, and the model takes 512"
    )
    assert tokens > 512 and found[0] == found[7]
    assert without_ours(Path("out.json").read_bytes()) == source.read_bytes()


def test_samples_that_the_model_cannot_read_do_not_stop_the_others(gemma, monkeypatch):
    """Three of twelve, of which one in a hundred may fail where nothing else is said."""
    source = write(results(samples(12), in_each=12))
    words = ["--input", source, "--model", gemma / "model", "--sae", gemma / "layer_1" / "sae"]
    annotate(*words, "--output", "all.json", "run.id=all")
    sick = {f"results[0].variations[{i}]" for i in (1, 2, 7)}
    monkeypatch.setattr(
        "saefty.annotation.job.load_model", lambda **how: poisoned(load_model(**how), *sick)
    )
    printed = annotate(*words, "--output", "out.json", "run.id=sick")
    assert printed.splitlines()[-1] == "in 12 = ok 9 + skipped 0 + failed 3 (forward_pass 3)"
    found, whole = entries(Path("out.json"), "layer_1"), entries(Path("all.json"), "layer_1")
    for i, (one, other) in enumerate(zip(found, whole, strict=True)):
        if i in (1, 2, 7):
            assert (one["status"], one["error"]) == ("error", "forward_pass: ValueError: no!")
        else:
            compare(one, other)
    said = annotate(*words, "--output", "no.json", "run.id=few", "engine.max_failed=0.1", code=3)
    assert "engine.max_failed" in said and not Path("no.json").exists()


def test_a_sample_whose_prompt_is_cut_off_says_that_no_token_of_it_is_left(tmp_path):
    folder = made_model("qwen3", tmp_path / "qwen3", "topk")  # without a BOS in front
    made = [{"prompt": "bake", "response": " bread"}, {"prompt": "bake", "response": "Z" * 600}]
    words = ["--input", write(results(made)), "--model", folder / "model", "--sae",
             folder / "layer_1" / "sae", "annotate.truncate=left"]  # fmt: skip
    annotate(*words, "--output", "out.json")
    good, bad = entries(Path("out.json"), "layer_1")
    assert good["status"] == "success"
    assert bad["error"] == (
        "no_prompt_token: no token that ends inside the prompt is left: the first one holds "
        "characters of the response"
    )


@pytest.mark.parametrize(
    ("tokens", "word"),
    [
        ("prompt_end", "no_prompt_token"),
        ("response", "no_response_token"),
        ("text", "no_text_token"),
        ("all", "no_token"),
    ],
)
def test_a_sample_without_a_wanted_token_says_which_were_wanted(tokens, word):
    found, sentence = error_of("", "no_tokens", 3, 9, tokens)
    assert found == word
    assert ("prompt" in sentence) == (tokens in ("prompt_end", "all"))
    assert ("response" in sentence) == (tokens != "text")


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3"])
def test_a_templated_prompt_has_one_bos_and_the_tokens_that_chat_gives(family, tmp_path):
    """The prompt as generation was given it, and the words with --chat: the same tokens."""
    folder = made_model(family, tmp_path / family, "topk")
    tokenizer = tiny_models.tokenizer_of(family)
    asked, reply = "how do I bake bread", "Mix flour, water"
    turns = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None)
    raw = write(results([{"prompt": prompt, "response": reply}]), "raw.json")
    chat = write(results([{"prompt": asked, "response": reply}]), "chat.json")
    shared = ("--model", folder / "model", "--sae", folder / "layer_1" / "sae")
    annotate("--input", raw, *shared, "--output", "raw_out.json")
    annotate("--input", chat, *shared, "--chat", "--output", "chat_out.json")
    (one,), (two,) = (entries(Path(f"{name}_out.json"), "layer_1") for name in ("raw", "chat"))
    assert one["total_tokens"] == len(ids)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert one["answer_start_position"] == two["answer_start_position"] == len(before) - 1
    assert one["activations"] == two["activations"]
    annotate("--input", raw, *shared, "--chat", "--output", "no.json", code=3)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--sae", "{layer_1}", "--target-layer", "2"], 6, "is of layer 1"),
        (["--sae-release", "{root}", "--sae-id", "layer_1/sae", "--target-layer", "2"], 6,
         "is of layer 1, but the target layer is 2"),
        (["--sae-release", "{root}", "--sae-id", "layer_1/sae"], 6, "the target layer is 20"),
        (["--sae", "{layer_1}", "--hook-name", "blocks.2.hook_resid_post"], 6, "in block 2"),
        (["--sae", "{layer_1}", "--hook-name", "blocks.1.hook_mlp_out"], 6,
         "the hook name is blocks.1.hook_mlp_out, but the SAE"),
        (["--sae", "{wide}"], 6, "reads activations 48 wide, but those of"),
        (["--sae", "nowhere"], 2, "there is no folder nowhere"),
        (["--sae", "{layer_1}", "--sae-id", "x"], 2, "not both"),
        (["--sae", "{layer_1}", "--layers", "1,2"], 2, "name one block for each SAE"),
        (["--sae", "{layer_1}", "--layers", "1", "--target-layer", "2"], 2, "Give one of them"),
        (["--sae", "{layer_1}", "--layers", "one"], 2, "takes numbers"),
        ([], 2, "default: release gemma-scope-9b-pt-res-canonical, id layer_20/width_16k/canonical,"
         " layer 20. Nothing was computed. Say which SAE belongs to this model: --sae FOLDER, or "
         "--sae-release and --sae-id with --target-layer."),
        (["--sae-release", "gemma-scope-9b-pt-res-canonicle"], 2,
         "no release of that name; the nearest releases are gemma-scope-9b-pt-res-canonical"),
        (["--sae", "{layer_1}", "--target-layer", "77"], 2, "Set --target-layer, or --layers"),
        (["--sae", "{layer_1},{layer_1}"], 2,
         "{layer_1} and {layer_1} are the same SAE, reading blocks.1.hook_resid_post"),
        (["--sae", "{layer_1},{layer_1}/../sae"], 2, "{layer_1} and {layer_1}/../sae are the same"),
        (["--sae", "{layer_1}", "--top-k", "0"], 2, "--top-k (output.top_k)"),
        (["--sae", "{layer_1}", "--max-samples", "0"], 2,
         "--max-samples (annotate.limit_examples)"),
        (["--sae", "{layer_1}", "--dtype", "int3"], 2, "--dtype (model.dtype)"),
        (["--sae", "{layer_1}", "output.top_k=0"], 2, "Error: output.top_k"),
        (["--sae", "{layer_1}", "--output", "in.json"], 2, "is the input itself"),
        (["--sae", "{layer_1}", "--input", "none.json"], 3, "there is no file none.json"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_before_the_weights_load(
    words, code, says, gemma, tmp_path, monkeypatch
):
    monkeypatch.setattr("saefty.annotation.job.load_model", None)
    source = write(results(samples(2)))
    wide = save_random_sae(tmp_path / "wide", 1, "topk", 48)
    names = {"layer_1": gemma / "layer_1" / "sae", "wide": wide, "root": gemma}
    given = [word.format(**names) for word in words]
    printed = annotate("--input", source, "--model", gemma / "model", *given, code=code)
    assert says.format(**names) in " ".join(printed.split())
    assert [path.name for path in Path().glob("*.json")] == ["in.json"]
