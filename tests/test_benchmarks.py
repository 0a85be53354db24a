"""The benchmarks run, on sizes at which their figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "training_speed.py": ["--rounds", "1", "--libraries", "saefty"],
    "analysis_speed.py": ["--ways", "saefty"],
    "extraction_speed.py": ["--rounds", "1", "--prompts", "6"],
    "encode_speed.py": ["--rounds", "1"],
    "annotate_speed.py": ["--rounds", "1", "--samples", "6"],
    "steering_speed.py": ["--rounds", "1"],
    "contrast_speed.py": ["--rounds", "1", "--prompts", "2"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_its_table(script):
    command = [sys.executable, ROOT / "benchmarks" / script, "--tiny", *SCRIPTS[script]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(line.startswith("| saefty") for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_comparison_of_steering_vectors_prints_a_row_a_family(tmp_path):
    script = ROOT / "benchmarks/steering_effects.py"
    command = [sys.executable, script, "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["caa confounded", "caa", "latent difference", "decoder", "sae_ts",
                        "rotation", "pseudo_inverse", "random"]  # fmt: skip
    assert (tmp_path / "rows.json").exists()


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    command = [sys.executable, ROOT / "benchmarks/memory.py", "--tiny", "--prompts", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("| ")]
    peaks = {row[0].strip(): float(row[3]) for row in rows[2:]}
    assert peaks["nothing"] < min(peaks["extract"], peaks["encode"], peaks["train"])


def test_every_table_has_its_place_on_the_page():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for name in ("training 512", "training 768", "extraction", "annotate", "analysis", "memory"):
        assert page.index(f"<!-- {name}: begin -->") < page.index(f"<!-- {name}: end -->")
