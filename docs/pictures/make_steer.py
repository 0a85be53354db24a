"""Draw docs/pictures/steer_pareto.png: by the commands of docs/steer.md, on the sandbox.

Run it after a change: `python docs/pictures/make_steer.py [FOLDER]` (three minutes). FOLDER keeps
the runs; the page's figures stand in `runs/*/summary.md` and `vectors/*/vector.json` there.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1]
PAGE, HEADING = DOCS / "steer.md", "## On the sandbox"
LATENTS = Path("vectors", "latents", "vector.json")


def page_blocks(language: str) -> list[str]:
    """Return the blocks of the page's part on the sandbox."""
    part = PAGE.read_text(encoding="utf-8").partition(HEADING)[2]
    return re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)


def run_page(folder: Path) -> None:
    """Do what the page says, with the latents that the run itself finds in place of the page's."""
    for block in page_blocks("yaml"):
        name = block.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block, encoding="utf-8")
    lines = [line for block in page_blocks("sh") for line in block.splitlines()]
    named = list(dict.fromkeys(re.findall(r"--latent (\d+)", "\n".join(lines))))
    for line in lines:
        words = shlex.split(line)[1:]
        if "--latent" in words:
            found = dict(zip(named, rising_latents(folder, len(named)), strict=True))
            words = [found.get(word, word) for word in words]
        sys.stdout.write(f"$ saefty {shlex.join(words)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "saefty", *words], cwd=folder, check=True)


def rising_latents(folder: Path, count: int) -> list[str]:
    """Return the latents that fire more on the positive side, those that rise most first."""
    listed = json.loads((folder / LATENTS).read_text("utf-8"))["provenance"]["latents"]
    return [str(latent) for latent, change in listed if change > 0][:count]


def main() -> None:
    """Run the page, and keep the picture that it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="Keeps the runs.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        run_page(folder)
        picture = DOCS / "pictures" / "steer_pareto.png"
        shutil.copyfile(folder / "runs" / "compare" / "plots" / "pareto.png", picture)


if __name__ == "__main__":
    main()
