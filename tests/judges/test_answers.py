"""The file of answers: shared, durable, and honest about damage."""

import logging
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from saefty.errors import ConfigError, DiskError
from saefty.judges.answers import Answer, Answers, question_key
from saefty.judges.faults import read_answer

ASKED = ("http://a/v1", "m", [{"role": "user", "content": "q"}], {"temperature": 0})
SEVEN = Answer("7", "stop", 100, 2, "m-1")


def test_an_answer_comes_back_as_it_was_in_another_run(tmp_path):
    odd = Answer("７\n\x00 «день»", None, 0, 0, "")
    with Answers(tmp_path / "new" / "c.sqlite") as cache:
        assert cache.get("a") is None
        cache.put("a", SEVEN)
        cache.put("b", odd)
    with Answers(tmp_path / "new" / "c.sqlite") as cache:
        assert (cache.get("a"), cache.get("b"), len(cache)) == (SEVEN, odd, 2)


def test_of_two_answers_to_one_question_the_first_is_kept_and_returned(tmp_path):
    """Two processes may ask the same at once; both must go on with the same score."""
    with Answers(tmp_path / "c.sqlite") as one, Answers(tmp_path / "c.sqlite") as other:
        assert one.put("a", SEVEN) == SEVEN
        assert other.put("a", Answer("3", "stop", 1, 1, "m")) == SEVEN


@pytest.mark.parametrize("place", range(4))
def test_whatever_is_asked_differently_is_another_question(place):
    others = ("http://b/v1", "n", [{"role": "user", "content": "p"}], {"temperature": 1})
    changed = [*ASKED[:place], others[place], *ASKED[place + 1 :]]
    assert question_key(*changed) != question_key(*ASKED)
    assert question_key(*ASKED) == question_key(*ASKED[:3], dict(ASKED[3]))


def test_the_order_of_a_request_s_fields_is_no_difference():
    one = question_key(*ASKED[:3], {"a": 1, "b": 2})
    assert one == question_key(*ASKED[:3], {"b": 2, "a": 1})


def filled(path: Path) -> Path:
    with Answers(path) as cache:
        for i in range(60):
            cache.put(f"{i:064d}", Answer(f"<{i}>" * 20, "stop", i, 1, "m"))
    return path


@pytest.mark.parametrize("damage", ["text", "half", "header", "middle"])
def test_a_file_that_cannot_be_read_is_moved_aside_and_said(tmp_path, caplog, damage):
    path = filled(tmp_path / "c.sqlite")
    data = path.read_bytes()
    broken = {
        "text": b"this is no database, it is a note of somebody's\n" * 100,
        "half": data[: len(data) // 2],
        "header": b"\0" * 100 + data[100:],
        "middle": data[:4096] + b"\xff" * (len(data) - 8192) + data[-4096:],
    }[damage]
    path.write_bytes(broken)
    with caplog.at_level(logging.WARNING), Answers(path) as cache:
        cache.put("a", SEVEN)
        assert cache.get("a") == SEVEN
        assert len(cache) == 1
    (aside,) = (
        one for one in tmp_path.iterdir() if "damaged" in one.name and "-journal" not in one.name
    )
    assert aside.read_bytes() == broken
    assert str(aside) in caplog.text
    assert "questions whose answers it held are asked again" in caplog.text


def test_an_empty_file_is_said_to_be_empty(tmp_path, caplog):
    (tmp_path / "c.sqlite").touch()
    with caplog.at_level(logging.WARNING), Answers(tmp_path / "c.sqlite") as cache:
        assert len(cache) == 0
    assert "is empty; it is begun anew" in caplog.text


def test_a_changed_byte_in_an_answer_is_noticed_and_the_answer_replaced(tmp_path, caplog):
    """SQLite itself reads it without a word: a 3 that was a 7 would be a score."""
    path = filled(tmp_path / "c.sqlite")
    data = path.read_bytes()
    assert data.count(b"<47>" * 20) == 1
    path.write_bytes(data.replace(b"<47>" * 20, b"<43>" * 20))
    key = f"{47:064d}"
    with caplog.at_level(logging.WARNING), Answers(path) as cache:
        assert cache.get(key) is None
        assert cache.get(f"{48:064d}").text == "<48>" * 20
        assert caplog.text.count("is damaged; its question is asked again") == 1
        assert cache.put(key, SEVEN) == SEVEN
        assert cache.get(key) == SEVEN


def test_a_flipped_bit_never_give_another_answer(tmp_path):
    path = filled(tmp_path / "c.sqlite")
    data, rng = path.read_bytes(), random.Random(0)
    wrong = 0
    for trial in range(100):
        place = rng.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        copy = tmp_path / f"{trial}" / "c.sqlite"
        copy.parent.mkdir()
        copy.write_bytes(flipped)
        try:
            with Answers(copy) as cache:
                for i in range(60):
                    found = cache.get(f"{i:064d}")
                    wrong += found not in (None, Answer(f"<{i}>" * 20, "stop", i, 1, "m"))
        except ConfigError:
            pass  # the version or a column's name has changed: refused, with nothing returned
    assert wrong == 0


def test_a_later_version_and_another_program_s_file_are_refused_and_stay(tmp_path):
    later, other = tmp_path / "later.sqlite", tmp_path / "other.sqlite"
    for path, statement in (
        (later, "PRAGMA user_version=7"),
        (other, "CREATE TABLE answers (question TEXT, answer TEXT)"),
    ):
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute(statement)
        connection.commit()
        connection.close()
    with pytest.raises(ConfigError, match="has version 7; this release reads up to 1"):
        Answers(later).__enter__()
    with pytest.raises(ConfigError, match="something else: its table .* question, answer"):
        Answers(other).__enter__()
    assert not list(tmp_path.glob("*damaged*"))


def test_a_folder_is_no_file_of_answers(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        Answers(tmp_path).__enter__()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="could not be written"):
        Answers(tmp_path / "file" / "c.sqlite").__enter__()


WRITER = """
import sys
from saefty.judges.answers import Answer, Answers
path, start = sys.argv[1], int(sys.argv[2])
with Answers(path) as cache:
    for i in range(start, start + 60):
        cache.put(f"{i % 90}", Answer(f"{start}", "stop", i, 1, "m"))
"""


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "c.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)]) for start in (0, 30)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    with Answers(path) as cache:
        assert len(cache) == 90
        assert {cache.get(f"{i}").text for i in range(90)} == {"0", "30"}
        assert cache.get("0").text == "0"
        assert cache.get("89").text == "30"


def test_two_processes_find_a_damaged_file_and_one_moves_it(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"no database " * 500)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)]) for start in (0, 30)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert len(list(tmp_path.glob("*damaged*"))) == 1
    with Answers(path) as cache:
        assert len(cache) == 90


def test_half_a_character_in_an_answer_is_kept_as_a_question_mark(tmp_path):
    message = SimpleNamespace(content="7 \ud83d", refusal=None)
    reply = SimpleNamespace(
        choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=None, model="m"
    )
    answer, _ = read_answer(reply)
    with Answers(tmp_path / "judge.sqlite") as answers:
        assert answers.put("key", answer).text == "7 ?"
