"""The doctor and the zoo: twelve sick SAEs, three healthy ones, and no record of any."""

import json

import pytest
from typer.testing import CliRunner

import zoo
from analyze.dumps import in_this_process
from saefty import cli, feature_dump
from saefty.config import build_config
from saefty.stages.doctor import DoctorConfig, check

ROWS = 2048
"""Fewer than a person would measure, so that fifteen take less than a minute."""


@pytest.fixture(autouse=True)
def without_a_child_process(monkeypatch):
    monkeypatch.setattr(feature_dump, "to_safetensors", in_this_process)


def examined(patient, **keys):
    section = {
        "sae": str(patient.sae), "store": str(patient.store), "dump": patient.dump, "rows": ROWS,
    }  # fmt: skip
    return check(build_config(DoctorConfig, {"doctor": {**section, **keys}}))


@pytest.fixture(scope="session")
def seen():
    return {}


@pytest.fixture
def visit(seen, zoo_home):
    """Return a patient and the doctor's report; each is examined once."""

    def visited(name):
        if name not in seen:
            patient = zoo.build(name, zoo_home)
            seen[name] = patient, examined(patient)
        return seen[name]

    return visited


def right(report, patient):
    return report.cause in patient.accepted if patient.accepted else report.healthy


def patients(*names):
    """Return names as parameters; those of a further training are slow."""
    slow = {"raw instead of standardised", "half dead"}
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


@pytest.mark.parametrize("name", patients(*zoo.SICK, *zoo.FURTHER))
def test_the_doctor_names_what_was_planted(name, visit):
    patient, report = visit(name)
    assert not list(patient.sae.glob("metrics*.json"))
    assert not report.healthy
    assert report.cause in patient.accepted, report.text()
    assert report.then


@pytest.mark.parametrize("name", zoo.HEALTHY)
def test_the_doctor_raises_no_false_alarm(name, visit):
    _, report = visit(name)
    assert report.healthy, report.text()
    assert report.cause is None
    assert not [one.sentence for one in report.findings if one.severity == "sick"]


def test_there_are_twelve_faults_and_three_healthy_ones():
    assert (len(zoo.SICK), len(zoo.HEALTHY)) == (12, 3)


REPAIRED = ("scale 10x off", "wrong layer", "pre for post", "raw instead of standardised")


@pytest.mark.parametrize("name", patients(*REPAIRED))
def test_the_repair_gives_the_figures_of_the_sae_without_the_fault(name, visit):
    patient, report = visit(name)
    best = max(
        (one for one in report.examination.repairs if one.trial.cause == report.cause),
        key=lambda one: one.gain,
    )
    l0, fvu = numpy_figures(*patient.sound)
    # Of all rows there; the doctor reads a third of them.
    assert best.figures.l0.value == pytest.approx(l0, rel=0.1)
    assert best.fvu == pytest.approx(fvu, rel=0.15)


def numpy_figures(sae, store, layer):
    """Return L0 and FVU by float64 NumPy."""
    x = zoo.rows_of(zoo.ActivationStore(store), layer)
    z, x_hat = zoo.read_by(sae, x)
    residual = ((x - x_hat) ** 2).sum()
    return (z > 0).sum(axis=1).mean(), residual / ((x - x.mean(axis=0)) ** 2).sum()


@pytest.mark.slow
def test_a_record_of_the_training_does_not_change_the_verdict(zoo_home):
    for name in ("positive encoder bias", "jumprelu"):
        patient = zoo.build(name, zoo_home, with_record=True)
        assert (patient.sae / "metrics.json").is_file()
        assert right(examined(patient), patient), name


def test_the_command_names_the_cause_and_ends_with_9(visit, tmp_path):
    patient, _ = visit("reconstruction instead of codes")
    words = [str(patient.sae), "--store", str(patient.store), "--dump_dir", str(patient.dump)]
    words += ["--rows", "1000", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli.app, ["doctor", *words])
    assert done.exit_code == 9, done.output
    figures = json.loads(done.stdout.splitlines()[0])["figures"]
    assert figures["cause"] == "reconstruction instead of codes"
    page = (tmp_path / "out" / "doctor.md").read_text()
    assert "The kept numbers are the reconstruction" in page
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["cause"] == figures["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_texts_and_trainings_make_no_difference(seed, zoo_home):
    wrong = []
    for name in (*zoo.SICK, *zoo.HEALTHY, *zoo.FURTHER):
        patient = zoo.build(name, zoo_home, seed)
        report = examined(patient, rows=8192)
        if not right(report, patient):
            wrong.append((name, report.sentence))
    assert not wrong
