"""What can go wrong, what happens then, and which tests prove it.

    python -m tests.matrix            print the table
    python -m tests.matrix --write    put it into docs/reliability.md

`test_matrix` fails if a row has neither a test nor a reason, if a test that is named here does not
exist, and if the page does not hold the table as it is here.
"""

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for `python -m tests.matrix`
from failures import activations, files, judges, process  # noqa: E402

PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ROWS = process.ROWS | activations.ROWS | files.ROWS | judges.ROWS


def tests_there_are() -> set[str]:
    """Return the names of all test functions below this folder."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(node.name)
    return found


def sentence(name: str) -> str:
    """Return a test's name as the sentence it is."""
    return name.removeprefix("test_").replace("_", " ")


def table() -> str:
    """Return the rows as a Markdown table."""
    lines = ["| | what goes wrong | what happens | proven by |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        proofs = "<br>".join(f"{sentence(test)}" for test in row.tests)
        left = f"{'<br>' if proofs else ''}*open: {row.open}*" if row.open else ""
        lines.append(f"| {name} | {row.failure} | {row.answer} | {proofs}{left} |")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """Return a page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
