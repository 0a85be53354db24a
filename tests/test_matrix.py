"""The table of failures is complete, names tests that exist, and stands in the docs as it is."""

import matrix

WANTED = [
    *(f"A{n}" for n in range(1, 19)),
    *(f"B{n}" for n in range(1, 27)),
    *(f"C{n}" for n in (1, 2, 3, 4, 6, 7, 8, 9, 10)),
    *(f"D{n}" for n in range(1, 12)),
    *(f"F{n}" for n in range(1, 8)),
    "G1",
    "G2",
]


def test_every_failure_that_concerns_what_there_is_is_in_the_table():
    assert list(matrix.ROWS) == WANTED


def test_every_row_has_a_test_or_says_why_not():
    for name, row in matrix.ROWS.items():
        assert row.tests or row.open, f"{name} has neither a test nor a reason"


def test_every_test_that_is_named_exists():
    there_are = matrix.tests_there_are()
    for name, row in matrix.ROWS.items():
        for test in row.tests:
            assert test in there_are, f"{name} names {test}, which does not exist"


def test_no_row_names_a_test_twice():
    for name, row in matrix.ROWS.items():
        assert len(set(row.tests)) == len(row.tests), name


def test_the_page_holds_the_table_as_it_is():
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert text == matrix.page_with_table(text), "run: python -m tests.matrix --write"
