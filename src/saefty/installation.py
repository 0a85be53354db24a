"""What a run was made with beside its settings: packages, Python, machine, the user's commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from saefty import matmul

RECORDED_PACKAGES = ("saefty", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def circumstances() -> dict[str, Any]:
    """Return what a run's metadata says about the installation and the machine."""
    return {
        "git_sha": _git_sha(),
        "versions": package_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **matmul.record(),
    }


def _git_sha() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 - whichever git the user has
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
