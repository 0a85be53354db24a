"""Tokens: from the environment or `.env`, and in no message."""

import json
import logging
import os
import pickle
import subprocess

import pytest
import typer

from saefty import cli
from saefty.command import guarded
from saefty.environment import Secret, load_environment, parse, redacted, secret
from saefty.errors import ExternalError

CANARY = "canary-value-of-no-known-shape"


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "x")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("HF_TOKEN=abc123", "abc123"),
        ("export HF_TOKEN = abc123", "abc123"),
        ("HF_TOKEN='abc # 123'", "abc # 123"),
        ('HF_TOKEN="abc123" # mine', "abc123"),
        ("HF_TOKEN=abc123 # mine", "abc123"),
        ("HF_TOKEN=abc=123", "abc=123"),
        ("HF_TOKEN=", None),
        ("# HF_TOKEN=abc123", None),
        ("MY_HF_TOKEN=abc123", None),
        ("HF_TOKEN abc123", None),
    ],
)
def test_a_line_of_dotenv_is_read_as_a_shell_reads_it(line, value):
    assert parse(f"OTHER=1\n{line}\n").get("HF_TOKEN") == value


def test_a_token_of_dotenv_is_taken_where_the_environment_has_none(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text(f"HF_TOKEN={CANARY}\n")
    assert load_environment() == ("HF_TOKEN",)
    assert os.environ["HF_TOKEN"] == CANARY
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    assert load_environment() == ()
    assert os.environ["HF_TOKEN"] == "of-the-environment"


def test_a_dotenv_of_windows_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfHF_TOKEN=abc123\r\n")
    assert load_environment() == ("HF_TOKEN",)
    assert os.environ["HF_TOKEN"] == "abc123"


def test_nothing_but_tokens_is_taken_from_dotenv(tmp_path):
    """Another hub's address beside a token would send the token there."""
    (tmp_path / ".env").write_text("HF_ENDPOINT=http://elsewhere\nLD_PRELOAD=x\n")
    assert load_environment() == ()
    assert "HF_ENDPOINT" not in os.environ


def test_no_dotenv_and_one_that_cannot_be_read_stop_nothing(tmp_path, caplog):
    assert load_environment() == ()
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\xfe")
    with caplog.at_level(logging.WARNING, logger="saefty"):
        assert load_environment() == ()
    assert "could not be read (UnicodeDecodeError)" in caplog.text


def test_a_dotenv_that_git_tracks_is_warned_of(tmp_path, caplog):
    (tmp_path / ".env").write_text(f"HF_TOKEN={CANARY}\n")
    subprocess.run(["git", "init", "-q", "."], check=True, timeout=60)
    with caplog.at_level(logging.WARNING, logger="saefty"):
        load_environment()
        assert "tracked" not in caplog.text
        subprocess.run(["git", "add", "-f", ".env"], check=True, timeout=60)
        load_environment()
    assert "holds HF_TOKEN and is tracked by git" in caplog.text
    assert CANARY not in caplog.text


def test_a_secret_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {CANARY} ")
    held = secret("HF_TOKEN")
    assert held.reveal() == CANARY
    for text in (repr(held), str(held), f"{held}", f"{held:>5}", repr({"a": [held]})):
        assert CANARY not in text
        assert "***" in text
    with pytest.raises(TypeError, match="not written"):
        pickle.dumps(held)
    with pytest.raises(TypeError):
        json.dumps(held)
    assert not hasattr(Secret("a"), "__dict__")


def test_a_variable_that_is_empty_is_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " ")
    assert secret("HF_TOKEN") is None


def test_texts_are_redacted_by_value_and_by_shape(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    token, key = "hf_" + "a" * 34, "sk-" + "b" * 40
    assert redacted(f"{CANARY}, {token}, {key}, hf_hub") == "***, ***, ***, hf_hub"
    signed = "403 for url 'https://cdn.example/a/b?Signature=x-y&Expires=1' at once? yes"
    assert redacted(signed) == "403 for url 'https://cdn.example/a/b?***' at once? yes"


def test_the_key_of_a_judge_is_taken_from_dotenv_and_kept_out_of_texts(tmp_path):
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY={CANARY}\n")
    assert load_environment() == ("OPENAI_API_KEY",)
    assert redacted(f"refused {CANARY}") == "refused ***"


def test_what_any_variable_that_was_asked_for_holds_is_kept_out_of_texts(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", CANARY)
    assert secret("MY_JUDGE_KEY").reveal() == CANARY
    assert redacted(f"refused {CANARY}") == "refused ***"


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_and_a_log_line_that_hold_a_token_are_printed_without_it(
    as_json, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    package = logging.getLogger("saefty")
    state = package.handlers, package.level, package.propagate

    def job():
        logging.getLogger("saefty.test").warning("asked with %s", CANARY)
        raise ExternalError(f"refused {CANARY}")

    try:
        with pytest.raises(typer.Exit):
            guarded(job, False, False, as_json)
    finally:
        package.handlers, package.level, package.propagate = state
    shown = capsys.readouterr()
    assert CANARY not in shown.out + shown.err
    assert "refused ***" in shown.err
    assert "asked with ***" in shown.err


def test_a_traceback_shows_no_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    path = f"/tmp/{CANARY}.json"
    monkeypatch.setattr("sys.argv", ["saefty", "annotate", "--input", path, "--debug"])
    package = logging.getLogger("saefty")
    state = package.handlers, package.level, package.propagate
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        package.handlers, package.level, package.propagate = state
    shown = capsys.readouterr()
    assert ended.value.code == 3
    assert "Traceback" in shown.err
    assert CANARY not in shown.out + shown.err


def test_no_command_takes_a_token_as_an_argument():
    """What stands on a command line is seen by every user of the machine."""
    from typer.main import get_command

    from saefty.cli import app

    def options(command):
        for one in getattr(command, "commands", {}).values():
            yield from options(one)
        yield from (name for parameter in command.params for name in parameter.opts)

    assert not [name for name in options(get_command(app)) if "token=" in name or name == "--token"]
