"""train.precision: what bfloat16 does, that it costs no quality, and that a run keeps to it."""

import json
import logging

import pytest
import torch

from saefty.backends import Backend
from saefty.errors import MismatchError
from saefty.kernels import rough, tiles
from saefty.kernels.base import KERNELS, SparseKernels, choose_kernels, largest
from saefty.kernels.compiled import library
from saefty.kernels.screened import Screen, Screened
from saefty.kernels.triton_sparse import Programs
from saefty.optimisation import Trainee
from saefty.saes.base import SaeConfig
from saefty.saes.section import SaeSection
from saefty.sandbox.planted import PlantedDictionary
from saefty.training_settings import OptimizerSection
from test_training import train

ON_CPU = type(choose_kernels("cpu")).__name__
D_IN, D_SAE, K, BATCH, STEPS = 64, 2048, 8, 256, 240
WORLD = PlantedDictionary(n_features=100, d_in=D_IN, active=4.0, offset=0.0)


class AsOnAGpu(KERNELS["triton"]):
    """What the kernels in Triton do with a product in bfloat16, their programs in torch."""

    def __init__(self):
        self._programs = Programs(None, None, True, "in torch")
        self.rough, self._halved = True, torch.empty(0, 0, dtype=torch.bfloat16)

    def _halves(self, x, W_enc):
        return True

    def _fits(self, *tensors):
        return False

    def _largest(self, pre, k, *, signed):
        assert pre.dtype == torch.bfloat16
        return largest(pre.float().relu(), k)


def uncertified(name="screened"):
    if name == "cpu" and library().functions is None:
        pytest.skip(library().reason)
    return type("Uncertified", (rough.Uncertified, KERNELS[name]), {})()


@pytest.fixture(scope="module")
def batches():
    x = torch.from_numpy(WORLD.sample(BATCH * 21))
    return (x / x.square().mean().sqrt()).split(BATCH)


def final_fvu(kernels, batches):
    """The mean over a few first weights: what one training ends with is known to 1e-3 only."""
    return sum(fvu_of_one(kernels, batches, seed) for seed in range(4)) / 4


def fvu_of_one(kernels, batches, seed):
    config = SaeConfig("topk", D_IN, D_SAE, K)
    optimizer = OptimizerSection(lr=1e-2, warmup_steps=0)
    trainee = Trainee(config, optimizer, grad_clip=1.0, n_steps=STEPS, dead_after=10**9)
    trainee.kernels = kernels
    *seen, held_out = batches
    trainee.start(seen[0], seed)
    for i in range(STEPS):
        trainee.step(seen[i % len(seen)], i)
    error = trainee.sae(held_out).detach() - held_out
    return float(error.square().sum() / (held_out - held_out.mean(0)).square().sum())


@pytest.fixture(scope="module")
def wanted(batches):
    return final_fvu(KERNELS["torch_sparse"](), batches)


@pytest.mark.parametrize("kernels", ["screened", "cpu", "as on a GPU"])
def test_the_final_fvu_is_that_of_float32_to_a_thousandth(kernels, batches, wanted):
    kernels = AsOnAGpu() if kernels == "as on a GPU" else uncertified(kernels)
    assert wanted < 0.2  # it has learnt
    assert abs(final_fvu(kernels, batches) - wanted) < 1e-3


@pytest.mark.parametrize("name", ["screened", "cpu"])
def test_most_of_what_is_chosen_is_what_float32_chooses_and_its_values_are(name, batches):
    W = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)).T / 8
    pre = batches[0] @ W
    code = uncertified(name).topk(batches[0], W, torch.zeros(D_SAE), K)
    torch.testing.assert_close(code.values, pre[code.row_of, code.indices], rtol=1e-4, atol=1e-5)
    wanted = torch.zeros_like(pre).scatter_(1, pre.topk(K).indices, 1.0)
    assert float((wanted[code.row_of, code.indices]).mean()) > 0.99
    assert len(code.values) == K * BATCH


def test_on_a_cpu_the_screen_leaves_its_bound_out(batches, monkeypatch):
    bounds, bound = [], Screen.bound

    def watch(self, x, rough_x):
        bounds.append(float(bound(self, x, rough_x).max()))
        return torch.full((len(x),), bounds[-1])

    monkeypatch.setattr(Screen, "bound", watch)
    x = batches[0]
    W = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)).T
    for kernels in (KERNELS["screened"](), uncertified()):
        kernels.topk(x, W, torch.zeros(D_SAE), K)
    certified, trusting = bounds
    assert certified > 0.1
    assert trusting < 1e-9


@pytest.mark.parametrize("units", [True, False])
def test_kernels_in_bfloat16_are_those_of_the_run_or_none(monkeypatch, units):
    monkeypatch.setattr(rough, "has_bfloat16_units", lambda: units)
    exact = KERNELS["screened"]()
    found = rough.in_bfloat16(exact)
    assert (found is not None) == units
    if units:
        assert isinstance(found, (Screened, SparseKernels))
        assert type(found).__name__ == "UncertifiedScreened"
    assert rough.in_bfloat16(KERNELS["torch_sparse"]()) is None


def bfloat16_units(monkeypatch, there):
    monkeypatch.setattr(rough, "has_bfloat16_units", lambda: there)


screens = pytest.mark.skipif(ON_CPU == "TorchSparse", reason="this processor screens nothing")


@screens
def test_a_run_in_bfloat16_goes_on_in_it_or_is_refused(tmp_path, monkeypatch):
    bfloat16_units(monkeypatch, there=True)
    backend = Backend.choose(tmp_path, "cpu", 2, "bfloat16")
    assert backend.precision == "bfloat16"
    backend.note(tmp_path)
    assert Backend.choose(tmp_path, "cpu", precision="bfloat16") == backend
    with pytest.raises(MismatchError, match=r"backend\.precision: 'bfloat16' -> 'float32'"):
        Backend.choose(tmp_path, "cpu")
    bfloat16_units(monkeypatch, there=False)
    with pytest.raises(MismatchError, match=r"backend\.precision: 'bfloat16' -> 'float32'"):
        Backend.choose(tmp_path, "cpu", precision="bfloat16")


def test_a_run_that_could_not_have_bfloat16_says_so_and_goes_on_in_float32(
    tmp_path, monkeypatch, caplog
):
    bfloat16_units(monkeypatch, there=False)
    with caplog.at_level(logging.WARNING):
        backend = Backend.choose(tmp_path, "cpu", 2, "bfloat16")
    assert backend.precision == "float32"
    assert "cpu gains nothing by bfloat16: float32 is used" in caplog.text
    backend.note(tmp_path)
    bfloat16_units(monkeypatch, there=True)
    assert Backend.choose(tmp_path, "cpu", precision="bfloat16") == backend


def test_a_note_from_before_precisions_is_one_of_float32(tmp_path):
    Backend("cpu", ON_CPU, 2).note(tmp_path)
    path = tmp_path / "backend.json"
    note = json.loads(path.read_text())
    del note["precision"]
    path.write_text(json.dumps(note))
    assert Backend.choose(tmp_path, "cpu").precision == "float32"


@screens
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_setting_reaches_the_steps_and_the_runs_record(tmp_path, monkeypatch, precision):
    bfloat16_units(monkeypatch, there=True)
    used, step = set(), Trainee.step

    def watch(self, x, number):
        used.add(isinstance(self.kernels, rough.Uncertified))
        return step(self, x, number)

    monkeypatch.setattr(Trainee, "step", watch)
    train(tmp_path, max_steps=4, precision=precision)
    assert used == {precision == "bfloat16"}
    assert json.loads((tmp_path / "backend.json").read_text())["precision"] == precision


def test_in_tiles_too_the_bound_is_left_out(batches, monkeypatch):
    if not tiles.ready():
        pytest.skip("no tile registers")
    bounds, call = [], tiles.call

    def watch(function, *given):
        if len(given) > 12:  # x, W, packed, b, four sizes, most, longest, farthest, ...
            bounds.append(given[9:11])
        call(function, *given)

    monkeypatch.setattr(tiles, "call", watch)
    W = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)).T
    for kernels in (KERNELS["cpu"](), uncertified("cpu")):
        kernels.topk(batches[0], W, torch.zeros(D_SAE), K)
    certified, trusting = bounds
    assert certified[0] == pytest.approx(float(W.norm(dim=0).max()), rel=1e-5)
    assert max(trusting) < 1e-9


@screens
def test_an_architecture_without_k_learns_in_float32_and_the_record_says_so(
    tmp_path, monkeypatch, caplog
):
    """Its gradients are estimated in a window that is narrower than what bfloat16 rounds off."""
    bfloat16_units(monkeypatch, there=True)
    made, step = [], Trainee.step

    def watch(self, x, number):
        made.append((self.sae.config.arch, isinstance(self.kernels, rough.Uncertified)))
        return step(self, x, number)

    monkeypatch.setattr(Trainee, "step", watch)
    with caplog.at_level(logging.WARNING):
        for arch in ("topk", "jumprelu"):
            sae = SaeSection(arch=arch, k=3, expansion_factor=3)
            train(tmp_path / arch, sae=sae, max_steps=2, precision="bfloat16")
    assert made == [("topk", True)] * 2 + [("jumprelu", False)] * 2
    assert "bfloat16 acts where the k largest latents are selected: jumprelu" in caplog.text
    notes = [json.loads((tmp_path / a / "backend.json").read_text()) for a in ("topk", "jumprelu")]
    assert [one["precision"] for one in notes] == ["bfloat16", "float32"]
