"""The shape of the package: imports go down the floors, siblings stay apart, files stay short."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "saefty"
MAX_LINES = 400

FLOORS = [
    ["errors", "environment"],
    ["registry", "log", "fsio", "interrupts", "matmul", "overlap"],
    ["config", "records", "tensorfile", "npzfile", "locks", "installation", "textfile",
     "fonts", "colours", "token_text", "linear", "words", "images"],
    ["runs", "jsonscan"],
    ["kernels", "stores", "data", "report", "engine", "hub", "pairing",
     "release_rules"],
    ["models", "saes", "metrics", "releases"],
    ["formats", "reading_settings"],
    ["image_checks"],
    [
        "interventions", "fidelity", "judges", "probes", "controls", "evaluation", "reading",
        "sources", "evaluation_settings", "checkpoints", "backends", "training_data",
        "training_settings", "token_sample",
    ],
    ["piece_rows"],
    ["pieces", "sae_sets", "code_pca", "steering_settings"],
    ["steering", "steering_compare_settings", "piecework", "latent_targets", "feature_dump"],
    ["sae_ts", "space", "extraction", "encoding", "optimisation", "baselines", "gating", "plots"],
    ["steering_scores", "off_target", "evaluation_inputs", "latent_gating", "delta_gating"],
    ["silencing"],
    ["steering_vectors", "steering_comparison", "training_pass", "harm_evaluation", "code_sources",
     "sentence_views", "guards"],
    ["steering_inputs", "steering_report", "steering_tables", "training", "code_analysis",
     "harm_tables", "detection"],
    ["silencing_report"],
    ["layers_report"],
    ["harm_report", "analysis_report", "steering_compare_report", "diagnosis"],
    ["stages"],
    ["storekeeping", "catalogue", "notebook", "functions", "sandbox", "command",
     "annotation", "sentences", "token_tables"],
    ["verify_command", "doctor_command", "releases_command", "steer_vector_command"],
    ["sae_commands", "steer_command", "store_commands", "data_command", "annotate_command",
     "analyze_command", "guard_command", "probe_command", "teacher_forcing", "tokens_command"],
    ["cli", "__init__"],
    ["__main__"],
]  # fmt: skip
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

SHARED = {
    "models": {
        "base",
        "hooks",
        "batching",
        "text",
        "chat",
        "checkpoint",
        "selfcheck",
        "transformer",
        "replies",
        "shared",
        "attention_off",
        "contrast",
        "contrast_check",
        "recomputation",
        "no_effect",
        "processors",
        "image_text",
        "decoder",
        "vlm",
    },
    "saes": {"base", "cfg", "published", "scaler", "threshold", "elementwise"},
    "stores": {"base", "activations", "blocks", "features", "index", "sentences", "jsonl"},
    "kernels": {"base", "torch_sparse", "screened", "compiled", "reaching", "tiles"},
    "metrics": {"base", "intervals"},
    "stages": {"base", "rows"},
    "interventions": {"base", "latents", "vectors"},
    "formats": {"base", "checkpoint", "writing"},
    "data": {"base", "labels", "published", "lengths", "overview", "image_cells"},
    "annotation": None,  # one job in several files: they may import each other
    "sae_ts": None,  # one method in several files, each built on the one before
    "detection": None,  # one comparison in several files, each built on the one before
    "diagnosis": None,  # one argument in several files, each built on the one before
    "guards": None,  # one detector in several files: they may import each other
    "judges": {"base", "coverage", "rating", "answers", "budget", "endpoint", "faults"},
    "sandbox": None,  # one small world in several files: they may import each other
}
"""What the files of a folder may import of it, beside its `base`."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Return the saefty modules that a file imports, typing-only ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saefty":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("saefty")}
    return found


def parts(module: str) -> list[str]:
    return module.split(".")[1:]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_part_has_a_floor_and_imports_go_down(path):
    here = part_of(path)
    assert here in FLOOR, f"{here} has no floor; put it on one in {Path(__file__).name}"
    for module in imports_of(path):
        there = parts(module)[0] if parts(module) else "__init__"
        if there == here or there not in FLOOR:
            continue
        assert FLOOR[there] < FLOOR[here], (
            f"{path.relative_to(PACKAGE)} (floor {FLOOR[here]}) imports {module} "
            f"(floor {FLOOR[there]}); a part imports from lower floors only"
        )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_of_a_folder_share_its_base_and_no_other_file(path):
    folder = path.parent.name
    if path.parent == PACKAGE or SHARED.get(folder, set()) is None or path.stem == "__init__":
        return
    allowed = SHARED.get(folder, set()) | {"base"}
    siblings = {other.stem for other in path.parent.glob("*.py")} - {"__init__", path.stem}
    for module in imports_of(path):
        names = parts(module)
        if names[0] == folder and len(names) > 1 and names[1] in siblings:
            assert names[1] in allowed, (
                f"{path.relative_to(PACKAGE)} imports its sibling {names[1]}; move what they share "
                "to base.py or to a lower floor"
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_a_person_reads_at_once(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(PACKAGE)} has {lines} lines; at most {MAX_LINES}"


NUMPY_ONLY = ("metrics", "plots", "report", "probes", "controls", "evaluation")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_reads_feature_stores_needs_no_torch(path):
    if part_of(path) not in NUMPY_ONLY:
        return
    text = path.read_text(encoding="utf-8")
    assert "import torch" not in text, f"{path.relative_to(PACKAGE)} imports torch"


WRITERS = ("write_text", "write_bytes", ".savefig(", "np.save(", "torch.save(", "save_file(")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_fsio_writes_final_paths(path):
    text = path.read_text(encoding="utf-8")
    if path.stem == "fsio":
        return
    for writer in WRITERS:
        # Within `fsio.staged(...)` a library writes to the temporary path.
        if writer in text:
            assert "fsio.staged(" in text, f"{path.relative_to(PACKAGE)} writes with {writer}"


UNSAFE = ("trust_remote_code=True", "allow_pickle=True", "weights_only=False", "shell=True")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_from_a_file_is_run(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for marker in UNSAFE:
        assert marker not in text, f"{path.relative_to(PACKAGE)} contains {marker}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}: {node.func.id}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "joblib", "dill", "marshal"}, f"{path} unpickles"
