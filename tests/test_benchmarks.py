"""The benchmarks run, on sizes at which their figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SAEFTY_CONTEXTS = "saefty extract, written to disk"
SCRIPTS = {
    "training_speed.py": ["--rounds", "1", "--libraries", "saefty"],
    "training_profile.py": [],
    "time_to_fvu.py": ["--libraries", "saefty"],
    "families_speed.py": ["--rounds", "1", "--libraries", "saefty"],
    "analysis_speed.py": ["--ways", "saefty"],
    "query_speed.py": ["--duckdb", "nowhere"],
    "extraction_speed.py": ["--rounds", "1", "--prompts", "6"],
    "context_speed.py": ["--rounds", "1", "--contexts", "8", "--ways", SAEFTY_CONTEXTS],
    "encode_speed.py": ["--rounds", "1"],
    "annotate_speed.py": ["--rounds", "1", "--samples", "6"],
    "steering_speed.py": ["--rounds", "1"],
    "contrast_speed.py": ["--rounds", "1", "--prompts", "2"],
    "gpu_training.py": ["--rounds", "1", "--libraries", "saefty"],
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
def test_the_growth_of_training_has_three_curves():
    command = [sys.executable, ROOT / "benchmarks/scaling.py", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:] == [
        *["saefty: latents"] * 2, *["saefty: SAEs in a pass"] * 2,
        *["saefty: rows of the store"] * 2,
    ]  # fmt: skip


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    command = [sys.executable, ROOT / "benchmarks/memory.py", "--tiny", "--prompts", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("| ")]
    peaks = {row[0].strip(): float(row[3]) for row in rows[2:]}
    assert peaks["nothing"] < min(peaks["extract"], peaks["encode"], peaks["train"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so_and_measures_nothing():
    command = [sys.executable, ROOT / "benchmarks/gpu_training.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("There is no CUDA GPU here, so nothing is measured")


@pytest.mark.slow
def test_memory_of_index_and_analyze_is_measured_with_and_without_rows():
    command = [sys.executable, ROOT / "benchmarks/codes_memory.py", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:6] for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    peaks = {(row[0].strip(), row[1].strip()): float(row[4]) for row in rows}
    assert [tokens for _, tokens in peaks] == ["0", "300", "3,000"] * 2
    assert all(peaks[job, "0"] < peaks[job, "3,000"] for job in ("index", "analyze"))


def test_every_table_has_its_place_on_the_page():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for name in ("training 512", "training 768", "families", "extraction", "contexts", "annotate",
                 "analysis", "codes memory", "query", "memory", "training profile 512",
                 "training profile 768", "time to FVU", "scaling"):  # fmt: skip
        assert page.index(f"<!-- {name}: begin -->") < page.index(f"<!-- {name}: end -->")
