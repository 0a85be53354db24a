"""What multiplies float32 matrices: as accurate as float32, put back, and kept by a run."""

import logging
import threading

import pytest
import torch

import tiny_models
from saefty import extraction, fsio, matmul, pieces
from saefty.config import load_config
from saefty.engine import run_tasks
from saefty.errors import ConfigError, MismatchError
from saefty.kernels import base
from saefty.kernels.base import affine
from saefty.kernels.products import differentiable_affine
from saefty.matmul import DEFAULT, FLOAT32, Measured, decide, probe, products
from saefty.stages import extract
from worker_jobs import Multiplying

OTHER = "onednn-tf32"
TEXTS = ["the cat sat on the mat", "a dog ran", "the bird flew over it", "one two three four"]

reachable = pytest.mark.skipif(
    OTHER not in matmul.measured()
    or not matmul._as_float32(matmul.measured()[OTHER], matmul.measured()[DEFAULT]),
    reason="oneDNN has no other way to multiply float32 here that is as accurate",
)


def says(monkeypatch, **ms):
    """Let the trial say how long each way took, all as accurate as float32; nothing is settled."""
    found = {name.replace("_", "-"): Measured(took, 1e-7) for name, took in ms.items()}
    monkeypatch.setattr(matmul, "measured", lambda: found)
    monkeypatch.setattr(matmul, "_settled", None)


def says_inaccurate(monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    matmul.measured()[OTHER] = Measured(1.0, 5e-4)


def switch():
    return torch.backends.mkldnn.matmul.fp32_precision


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _untouched():
    before, settled = switch() if matmul._has_switch() else "", matmul._settled
    yield
    assert not matmul._has_switch() or switch() == before
    matmul._settled = settled


def slow(x, w):
    for _ in range(9):
        _ = x @ w
    return x @ w


def rounded(x, w):
    return (x.bfloat16() @ w.bfloat16()).float()


def test_a_fast_way_that_rounds_is_refused_and_a_fast_accurate_one_taken():
    found = probe({DEFAULT: slow, "rounds": rounded})
    assert found["rounds"].ms == float("inf")  # it is not timed
    assert found["rounds"].error > 100 * found[DEFAULT].error
    assert decide(found) == DEFAULT
    assert decide(probe({DEFAULT: slow, "rounds": rounded, "good": torch.matmul})) == "good"


def test_a_way_that_was_wrong_once_is_not_tried_on():
    calls = []

    def counted(x, w):
        calls.append(x.shape)
        return rounded(x, w)

    probe({DEFAULT: torch.matmul, "rounds": counted})
    assert len(calls) == 1


def test_the_error_of_the_trial_is_that_of_numpy_in_float64():
    seen = []

    def off_by_one(x, w):
        out = x @ w
        if x.shape == (67, 300):
            seen.append((x[3].double().numpy(), w[:, 5].double().numpy()))
            out[3, 5] += 1.0
        return out

    found = probe({DEFAULT: off_by_one})[DEFAULT].error
    row, column = seen[0]
    assert found == pytest.approx(1 / ((row**2).sum() * (column**2).sum()) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("laid_out", ["by row", "by column"])
def test_a_way_that_rounds_in_some_products_alone_is_refused(laid_out):
    def sometimes(x, w):
        rounds = len(x) == 1 and w.is_contiguous() == (laid_out == "by row")
        return rounded(x, w) if rounds else x @ w

    assert decide(probe({DEFAULT: slow, "sometimes": sometimes})) == DEFAULT


def test_the_trial_leaves_the_number_of_threads_and_random_numbers_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        probe({DEFAULT: lambda x, w: 1 / 0})
    probe({DEFAULT: torch.matmul})
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_near_tie_goes_to_torchs_default_so_that_chance_does_not_decide():
    ways = {DEFAULT: Measured(1.4, 1e-7), "a": Measured(1.0, 2e-7)}
    assert decide(ways) == DEFAULT
    assert decide({**ways, "b": Measured(0.5, 2e-7)}) == "b"
    assert decide({**ways, "b": Measured(0.5, 4.1e-7)}) == DEFAULT
    assert decide({**ways, matmul.TILES: Measured(1.3, 2e-7)}) == matmul.TILES
    assert decide({**ways, matmul.TILES: Measured(1.5, 2e-7)}) == DEFAULT


def test_no_way_counts_as_accurate_beside_a_default_that_is_not(caplog):
    with caplog.at_level(logging.WARNING, "saefty"):
        assert decide({DEFAULT: Measured(9.0, 5e-4), "a": Measured(1.0, 6e-4)}) == DEFAULT
    assert "wrong by 5e-04 of the norms, beyond float32 (1e-06)" in caplog.text
    assert decide({DEFAULT: Measured(9.0, 5e-4), "a": Measured(1.0, 1e-7)}) == "a"


def test_the_way_that_was_chosen_here_is_as_accurate_as_float32_and_both_agree():
    x, w, b = draw(300, 512), draw(512, 1000, seed=1), draw(1000, seed=2)
    true = x.double() @ w.double() + b.double()
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=0)
    for way in {DEFAULT, matmul.choose(), OTHER if matmul._is_accurate(OTHER) else DEFAULT}:
        with products(way):
            assert float(((affine(x, w, b) - true).abs() / size).max()) < FLOAT32


@reachable
def test_the_setting_of_the_process_is_touched_within_the_context_alone():
    before = switch()
    with products(OTHER):
        assert switch() == "tf32"
        with products():
            assert switch() == "tf32"
        assert switch() == "tf32"
    assert switch() == before
    with pytest.raises(ZeroDivisionError), products(OTHER):
        _ = 1 / 0
    assert switch() == before
    assert torch.get_float32_matmul_precision() == "highest"


@reachable
def test_contexts_of_several_threads_hold_until_the_last_one_is_left():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other_thread():
        with products(OTHER):
            entered.set()
            leave.wait(10)
            seen.append(switch())

    thread = threading.Thread(target=other_thread)
    with products(OTHER):
        thread.start()
        assert entered.wait(10)
    leave.set()
    thread.join()
    assert seen == ["tf32"]


@reachable
def test_another_way_within_one_is_refused_with_both_names():
    with (
        products(OTHER),
        pytest.raises(ConfigError, match="by onednn-tf32 now, and by default is asked"),
        products(DEFAULT),
    ):
        pass


@reachable
def test_what_a_script_allows_for_itself_does_not_reach_our_products():
    x, w, b = draw(64, 512), draw(512, 300, seed=1), torch.zeros(300)
    with products(DEFAULT):
        wanted = affine(x, w, b)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with products(DEFAULT):
            assert torch.equal(affine(x, w, b), wanted)
        assert switch() == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@reachable
def test_an_encoders_product_goes_the_chosen_way_with_and_without_gradients(monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    seen, true = [], torch.addmm

    def watched(*args, **options):
        seen.append(switch())
        return true(*args, **options)

    monkeypatch.setattr(base.torch, "addmm", watched)
    x, w, b = draw(8, 16), draw(16, 32, seed=1).requires_grad_(), torch.zeros(32)
    affine(x, w.detach(), b)
    differentiable_affine(x, w, b)
    assert seen == ["tf32", "tf32"]


def test_the_environment_names_the_way_and_is_refused_where_it_is_wrong(monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    assert matmul.choose() == OTHER
    monkeypatch.setenv(matmul.VARIABLE, "default")
    assert matmul.choose() == matmul.choose(OTHER) == DEFAULT
    monkeypatch.setenv(matmul.VARIABLE, "mkl")
    with pytest.raises(ConfigError, match="SAEFTY_MATMUL is mkl") as caught:
        matmul.choose()
    assert "default, amx-bf16x3, onednn-tf32, onednn-bf16" in caught.value.then
    says_inaccurate(monkeypatch)
    for asked, error in {OTHER: "5e-04", "onednn-bf16": "not known"}.items():
        monkeypatch.setenv(matmul.VARIABLE, asked)
        with pytest.raises(ConfigError, match=f"their error is {error}.*default 1e-07"):
            matmul.choose()


def test_what_a_run_was_begun_with_stays_unless_it_is_not_accurate_here(monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    assert matmul.choose(DEFAULT) == DEFAULT
    says(monkeypatch, default=1.0, onednn_tf32=9.0)
    assert matmul.choose(OTHER) == OTHER
    assert matmul.choose("of-another-version") == DEFAULT
    says_inaccurate(monkeypatch)
    assert matmul.choose(OTHER) == DEFAULT


@reachable
def test_worker_processes_multiply_the_way_their_parent_does(monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    (way,) = run_tasks([0], Multiplying(), lambda *task: task, 1, 1, lambda n: None)
    assert way == OTHER


@pytest.fixture
def extract_into(tmp_path):
    """Return a function that extracts into a folder, or goes on with it, three rows a piece."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    words = [
        f"model.name={tiny_models.folder_of('llama')}", f"data.path={data}", "extract.layers=1",
        "extract.save.shard_size=8",
    ]  # fmt: skip

    def run(name):
        place = f"run.dir={tmp_path / name}"
        extract.run(load_config(extract.ExtractConfig, None, [*words, place]))
        return tmp_path / name

    return run


def unfinished(folder):
    (folder / "finished.json").unlink()
    return fsio.read_sealed(folder / "metadata.json")


def passes_that_are_kept(monkeypatch):
    """Return what the switch says in each forward pass that is read from now on."""
    seen, true = [], pieces.PieceReader._captured

    def watched(*args):
        seen.append(switch())
        return true(*args)

    monkeypatch.setattr(pieces.PieceReader, "_captured", watched)
    return seen


@reachable
def test_an_extraction_goes_on_the_way_it_was_begun(extract_into, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    whole = extract_into("whole")
    commit, seen = extraction.commit_activations, passes_that_are_kept(monkeypatch)

    def stops(writer, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return commit(writer, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "commit_activations", stops)
        extract_into("halves")
    says(monkeypatch, default=1.0, onednn_tf32=9.0)
    halves = extract_into("halves")
    assert set(seen) == {"tf32"}
    metadata = fsio.read_sealed(halves / "metadata.json")
    assert metadata["matmul"]["chosen"] == metadata["inputs"]["model"]["matmul"] == OTHER
    assert metadata["matmul"]["errors"][DEFAULT] == "1e-07"
    shards = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        assert (halves / shard).read_bytes() == (whole / shard).read_bytes()


@reachable
def test_an_extraction_is_refused_where_its_way_is_not_accurate(extract_into, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    unfinished(extract_into("run"))
    says_inaccurate(monkeypatch)
    with pytest.raises(MismatchError, match="SAEFTY_MATMUL: 'onednn-tf32' -> 'default'"):
        extract_into("run")


@reachable
def test_a_run_that_says_nothing_was_made_by_torchs_default(extract_into, monkeypatch):
    says(monkeypatch, default=1.0, onednn_tf32=9.0)
    folder = extract_into("run")
    metadata = unfinished(folder)
    assert metadata.pop("matmul")["chosen"] == DEFAULT
    assert "matmul" not in metadata["inputs"]["model"]
    fsio.commit_sealed(folder / "metadata.json", metadata)
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    extract_into("run")
    assert matmul.chosen() == DEFAULT
    monkeypatch.setenv(matmul.VARIABLE, OTHER)
    with pytest.raises(MismatchError, match="SAEFTY_MATMUL: 'default' -> 'onednn-tf32'"):
        extract_into("run")
