"""The command line itself: help at once, messages for errors, a line that resumes."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from saefty import cli, command, interrupts
from saefty.errors import ConfigError, DiskError, InputError

COMMANDS = [
    ["extract"], ["train"], ["encode"], ["analyze"], ["eval"], ["demo"], ["list"], ["store"],
    ["store", "list"], ["store", "verify"], ["store", "repair"], ["store", "export"],
    ["store", "import"], ["sae"], ["sae", "info"], ["sae", "list"], ["sae", "convert"],
    ["sae", "verify"], ["data"], ["data", "show"], ["annotate"], ["tokens"], ["compare-tokens"],
    ["compare-layers"], ["show-tokens"], ["doctor"], ["probe"],
    ["guard"], ["guard", "score"], ["guard", "info"],
    ["steer"], ["steer", "generate"], ["steer", "sweep"], ["steer", "effects"],
    ["steer", "vector"], ["steer", "compare"],
]  # fmt: skip


@pytest.fixture
def guarded(monkeypatch, capsys):
    """Run a job as a command does; return its exit code, standard output and standard error."""
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    handler = signal.getsignal(signal.SIGTERM)

    def run(job, *words, as_json=False):
        monkeypatch.setattr(sys, "argv", ["saefty", *words])
        code = 0
        try:
            command.guarded(job, False, False, as_json)
        except typer.Exit as error:
            code = error.exit_code
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def raising(error, folder=None):
    def job():
        if folder is not None:
            interrupts.resumable = Path(folder)
        raise error

    return job


def resume_line(err):
    return err.split("To resume: ")[1].strip()


def test_help_answers_within_a_third_of_a_second():
    program = Path(sys.executable).with_name("saefty")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3, times


def test_help_loads_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom saefty.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words):
    result = CliRunner().invoke(cli.app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_every_command_is_among_those_tested():
    known = {tuple(words) for words in COMMANDS}
    named = {(c.name or c.callback.__name__.strip("_"),) for c in cli.app.registered_commands}
    named |= {("store", c.name) for c in cli.stores.registered_commands}
    for group, app in (("sae", cli.saes), ("guard", cli.guards), ("steer", cli.steering)):
        named |= {(group, c.name) for c in app.registered_commands}
    assert named <= known


def test_a_misspelt_command_names_the_nearest():
    result = CliRunner().invoke(cli.app, ["extrct"])
    assert result.exit_code == 2
    assert "Did you mean 'extract'?" in result.output


def test_no_command_shows_the_help():
    assert "Usage:" in CliRunner().invoke(cli.app, []).output


def test_list_prints_a_name_a_line_or_one_json_list(capsys):
    words = CliRunner().invoke(cli.app, ["list", "saes"]).output.split()
    assert "topk" in words
    assert json.loads(CliRunner().invoke(cli.app, ["list", "saes", "--json"]).output) == words


def test_an_error_is_its_three_parts_on_stderr_and_its_exit_code(guarded):
    error = InputError("d.csv holds no examples.", safe="Nothing was written.", then="Check it.")
    code, out, err = guarded(raising(error), "extract")
    assert (code, out) == (3, "")
    assert err == "Error: d.csv holds no examples.\nNothing was written.\nCheck it.\n"


def test_an_error_in_json_is_one_object_with_its_parts(guarded):
    error = DiskError("full", safe="kept", then="free some")
    _, out, err = guarded(raising(error, "x"), "extract", as_json=True)
    assert out == ""
    assert json.loads(err) == {
        "error": "DiskError", "exit_code": 5, "message": "full", "safe": "kept",
        "then": "free some", "run": "x",
    }  # fmt: skip


def test_a_full_disk_prints_the_line_that_goes_on(guarded):
    _, _, err = guarded(raising(DiskError("full"), "a/x"), "extract", "model.name=m")
    assert resume_line(err) == "saefty extract model.name=m run.dir=a/x"


def test_an_error_that_wants_other_settings_prints_no_line_that_resumes(guarded):
    _, _, err = guarded(raising(ConfigError("sae.k is too large."), "a/x"), "train")
    assert err == "Error: sae.k is too large.\n"


def test_an_interrupt_exits_130_and_a_termination_143(guarded):
    code, _, told = guarded(raising(KeyboardInterrupt()), "extract")
    assert code == 130
    assert "No run had begun: the same command starts it." in told
    assert guarded(raising(command.Terminated()), "extract")[0] == 143


def test_sigterm_is_an_interrupt_while_a_command_runs(guarded):
    code, _, err = guarded(lambda: signal.raise_signal(signal.SIGTERM), "extract")
    assert code == 143
    assert "What was committed is safe" in err


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "model.name=my model", "data.harmful=[a, b]", "extract.layers=[0,2]"],
        ["extract", "-c", "run.yaml", "data.text=it's"],
        ["train", "sae.k=[8,16]", "--quiet"],
        ["eval", "eval.features=$HOME/x;y", "eval.layers=*"],
    ],
)
def test_the_line_that_resumes_is_the_same_words_through_a_shell(guarded, words):
    _, _, err = guarded(raising(KeyboardInterrupt(), "runs/my x"), *words, "run.id=7", "run.root=r")
    assert shlex.split(resume_line(err)) == ["saefty", *words, "run.dir=runs/my x"]


def test_a_program_that_calls_a_command_is_told_the_folder_to_resume(guarded):
    _, _, err = guarded(raising(DiskError("The disk is full."), "a/x"))
    assert resume_line(err) == "the same command with run.dir=a/x"


@pytest.mark.parametrize("words", [["demo", "--short"], ["store", "repair", "x"]])
def test_a_command_that_takes_no_settings_is_resumed_by_itself(guarded, words):
    _, _, err = guarded(raising(KeyboardInterrupt(), "artifacts/demo/extract"), *words)
    assert shlex.split(resume_line(err)) == ["saefty", *words]
