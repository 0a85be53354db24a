"""Every set of kernels by name, where it can run; those in Triton on a GPU or in its interpreter.

The interpreter takes about a tenth of a second for a row, so tests give it `few` rows.
"""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from saefty.kernels.base import KERNELS, SparseKernels
from saefty.kernels.compiled import library
from saefty.kernels.triton_sparse import programs

FEW = 9


def kernels_or_skip(name):
    """Return kernels that take tensors of the CPU, or skip the test with the reason."""
    if name == "cpu" and library().functions is None:
        pytest.skip(library().reason)
    return triton_or_skip() if name == "triton" else KERNELS[name]()


def triton_or_skip(*, rough=False):
    """Return the kernels in Triton, or skip the test with the reason."""
    if programs().sums is None:
        pytest.skip(programs().reason)
    kernels = KERNELS["triton"](rough=rough)
    return kernels if programs().interpreted else Elsewhere(kernels, "cuda")


def interpreted(kernels):
    """Return whether each row costs a tenth of a second."""
    return isinstance(kernels, KERNELS["triton"]) and programs().interpreted


def few(kernels, rows):
    """Return as many of the rows as the kernels can work through in a test."""
    return rows[:FEW] if interpreted(kernels) else rows


class Elsewhere:
    """Kernels on another device: what goes in is copied there, and what comes out, back."""

    def __init__(self, kernels, device):
        for name in dir(SparseKernels):
            if not name.startswith("_"):
                setattr(self, name, self._carried(getattr(kernels, name), device))

    @staticmethod
    def _carried(method, device):
        def call(*given, **named):
            there = moved(given, device)
            found = method(*there, **moved(named, device))
            if method.__name__ == "adamw":
                for mine, changed in zip(given[:3], there[:3], strict=True):
                    mine.copy_(changed)
            return moved(found, "cpu")

        return call


def moved(given, device):
    """Return the same with all tensors on a device."""
    if isinstance(given, torch.Tensor):
        return given.to(device, copy=True)
    if isinstance(given, (tuple, list)):
        return type(given)(moved(one, device) for one in given)
    if isinstance(given, dict):
        return {key: moved(one, device) for key, one in given.items()}
    if is_dataclass(given):
        return replace(
            given, **{one.name: moved(getattr(given, one.name), device) for one in fields(given)}
        )
    return given
