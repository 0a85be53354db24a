"""`saefty annotate` killed, repeated, and kept from the files of others."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from annotating import annotate, entries, write
from annotation_truth import (
    results,
    samples,
)


def test_a_run_that_was_killed_goes_on_and_the_file_is_the_same(gemma):
    """Killed by SIGKILL when the first pieces are committed; --top-k may differ on resuming."""
    source = write(results(samples(60)))
    words = ["--input", str(source), "--model", str(gemma / "model"), "--sae",
             str(gemma / "layer_1" / "sae"), "annotate.save.shard_size=10"]  # fmt: skip
    annotate(*words, "--output", "whole.json", "run.root=elsewhere")
    code = (
        "import os, signal, sys\n"
        "from saefty import cli, encoding\n"
        "commit, done = encoding.encode_and_commit, []\n"
        "def killing(*given):\n"
        "    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(1)\n"
        "    return commit(*given)\n"
        "encoding.encode_and_commit = killing\n"
        "cli.main()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, "annotate", *words, "--output", "out.json"],
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not Path("out.json").exists()
    (run,) = Path("artifacts/annotate").iterdir()
    assert len(list((run / "records").glob("piece_*.json"))) == 3
    annotate(*words, "--output", "out.json")
    assert Path("out.json").read_bytes() == Path("whole.json").read_bytes()
    annotate(*words, "--output", "few.json", "--top-k", 1)
    assert [one.name for one in Path("artifacts/annotate").iterdir()] == [run.name]
    for few, all_of_them in zip(
        entries(Path("few.json"), "layer_1"), entries(Path("out.json"), "layer_1"), strict=True
    ):
        token, whole = (one["activations"]["last_token"] for one in (few, all_of_them))
        assert token["top_k_features"] == whole["top_k_features"][:1]
        assert token["num_active_features"] == whole["num_active_features"]


@pytest.mark.slow
def test_workers_write_the_same_file(gemma):
    source = write(results(samples(40)))
    words = ["--input", source, "--model", gemma / "model", "--sae", gemma / "layer_1" / "sae",
             "annotate.save.shard_size=10"]  # fmt: skip
    annotate(*words, "--output", "one.json", "run.id=one")
    annotate(*words, "--output", "two.json", "run.id=two", "engine.workers=2")
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


def test_an_activation_that_is_not_finite_fails_its_sample_alone(gemma, tmp_path):
    """A word whose embedding overflows: its samples say so, the others have features."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gemma / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma / "model")
    (bad,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = [{"prompt": "bake bread", "response": " r"}, {"prompt": "Z", "response": " r"},
            {"prompt": "bake", "response": " Z"}]  # fmt: skip
    source = write(results(made))
    words = ["--input", source, "--model", tmp_path / "model", "--sae", gemma / "layer_1" / "sae"]
    printed = annotate(*words, "--output", "out.json")
    assert printed.splitlines()[-1] == "in 3 = ok 2 + skipped 0 + failed 1 (not_finite 1)"
    assert [one["status"] for one in entries(Path("out.json"), "layer_1")] == [
        "success", "error", "success",
    ]  # fmt: skip


def test_an_output_that_another_wrote_is_refused_and_ones_own_is_written_again(gemma, monkeypatch):
    source = write(results(samples(6)))
    words = ["--input", source, "--model", gemma / "model", "--sae", gemma / "layer_1" / "sae"]
    output = Path("out.json")
    output.write_text("a thesis")
    with monkeypatch.context() as patch:
        patch.setattr("saefty.annotation.job.load_model", None)  # before any computing
        said = " ".join(annotate(*words, "--output", output, code=2).split())
    assert "out.json exists already (8 bytes) and was not written by this run" in said
    assert "Nothing in it was touched" in said and "Name another file with --output" in said
    assert output.read_text() == "a thesis"
    output.unlink()
    annotate(*words, "--output", output)
    first = output.read_bytes()
    annotate(*words, "--output", output.absolute())
    assert output.read_bytes() == first
    annotate(*words, "--output", output, "--top-k", 1)  # the same run may replace what it wrote
    few = output.read_bytes()
    assert few != first
    output.write_bytes(few + b"\n")
    said = " ".join(annotate(*words, "--output", output, code=2).split())
    assert "was changed since this run wrote it" in said and output.read_bytes() == few + b"\n"
    output.write_bytes(few)
    annotate(*words, "--output", output, "--max-samples", 2, code=2)  # another run's
    assert output.read_bytes() == few


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_naming_of_the_output_leaves_it_ones_own(when, gemma, monkeypatch):
    """The record is made before the file takes its place, and what stood there stays known."""
    words = ["--input", write(results(samples(4))), "--model", gemma / "model", "--sae",
             gemma / "layer_1" / "sae", "--output", "out.json"]  # fmt: skip
    annotate(*words)
    first = Path("out.json").read_bytes()
    replace = os.replace

    def killing(temporary, final):
        if Path(final).name != "out.json" or when == "after":
            replace(temporary, final)
        if Path(final).name == "out.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killing)
        annotate(*words, "--top-k", 1, code=130)
    assert (Path("out.json").read_bytes() == first) == (when == "before")
    annotate(*words, "--top-k", 1)
    assert Path("out.json").read_bytes() != first
    annotate(*words)
    assert Path("out.json").read_bytes() == first


def test_a_sample_that_was_not_tokenised_has_no_number_of_tokens_and_the_log_one_count(
    gemma, caplog
):
    logging.getLogger("saefty").propagate = True  # a command in this process may have cut it off
    caplog.set_level("INFO")
    made = [{"prompt": "bake", "response": " bread"}, {"prompt": "", "response": "r"},
            {"prompt": "p", "response": 5}, {"prompt": "p"},
            {"prompt": "word " * 300, "response": "r"}]  # fmt: skip
    annotate("--input", write(results(made)), "--model", gemma / "model", "--sae",
             gemma / "layer_1" / "sae", "--output", "out.json")  # fmt: skip
    found = entries(Path("out.json"), "layer_1")
    assert ["total_tokens" in one for one in found] == [True, False, False, False, True]
    assert found[4]["total_tokens"] > 512
    assert "left out" not in caplog.text and "skipped 4" not in caplog.text
    assert "failed 4 (empty_prompt 1, no_response 1, response_not_text 1, too_long 1)" in (
        caplog.text
    )


def test_a_bos_alone_is_no_token_of_the_prompt(gemma):
    """The first token of the text holds characters of both, so that none ends inside the prompt."""
    tokenizer = tiny_models.tokenizer_of("gemma2")
    (bos, joined, *_), word = tokenizer("the fox")["input_ids"], "the"
    assert bos == tokenizer.bos_token_id and tokenizer.decode([joined]) == word
    made = [{"prompt": "th", "response": "e fox"}, {"prompt": "the", "response": " fox"}]
    words = ["--input", write(results(made)), "--model", gemma / "model", "--sae",
             gemma / "layer_1" / "sae"]  # fmt: skip
    annotate(*words, "--output", "out.json")
    bad, good = entries(Path("out.json"), "layer_1")
    assert bad["error"].startswith("no_prompt_token: ") and "activations" not in bad
    assert (good["status"], good["answer_start_position"]) == ("success", 1)
    annotate(*words, "--save-all-tokens", "--output", "all.json")
    assert [one["status"] for one in entries(Path("all.json"), "layer_1")] == ["success"] * 2


def test_what_a_kill_left_beside_the_output_is_removed_and_nothing_else(gemma):
    words = ["--input", write(results(samples(4))), "--model", gemma / "model", "--sae",
             gemma / "layer_1" / "sae", "--output", "out.json"]  # fmt: skip
    annotate(*words)
    stray, foreign = Path(".tmp-0123456789ab-out.json"), Path(".tmp-0123456789ab-other.json")
    for path in (stray, foreign):
        path.write_text("half")
    annotate(*words)
    assert not stray.exists() and foreign.exists() and Path("out.json").exists()


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_sample_is_too_long_from_one_token_above_the_models_length(over, gemma):
    tokenizer = tiny_models.tokenizer_of("gemma2")
    prompt = "a" * 500  # a token each, behind the BOS
    n = 512 - len(tokenizer(prompt)["input_ids"]) + over
    made = [{"prompt": prompt, "response": "Z" * n}, {"prompt": "a", "response": "Z"}]
    length = len(tokenizer(prompt + "Z" * n)["input_ids"])
    assert length == 512 + over
    source = write(results(made))
    shared = ("--input", source, "--model", gemma / "model", "--sae", gemma / "layer_1" / "sae")
    annotate(*shared, "--output", "out.json")
    found = entries(Path("out.json"), "layer_1")[0]
    if over > 0:
        assert found["error"].startswith(f"too_long: prompt and response have {length} tokens")
        annotate(*shared, "--output", "cut.json", "annotate.truncate=left")
        cut = entries(Path("cut.json"), "layer_1")[0]
        assert cut["truncated"] and cut["total_tokens"] == 512
        assert cut["answer_start_position"] == 512 - n - 1
    else:
        assert found["total_tokens"] == length and found["status"] == "success"
