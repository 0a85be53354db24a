"""Compile every program to machine code for a GPU, which needs Triton and no GPU.

Usage: TRITON_INTERPRET=0 python tests/kernels/compile_for_gpus.py [ARCHITECTURE ...]

The interpreter runs the programs as Python, and so accepts what the compiler would not.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saefty.kernels.programs import selection, sums

ARCHITECTURES = (90,)
INTEGERS = {"stride", "d_sae", "k", "most", "width", "each", "size"}
PLACES = {"latents", "offsets", "places", "starts", "firsts", "lasts", "chosen"}


def types(program, constants, number):
    """Return what kind of argument each name of a program is."""
    found = {}
    for name in program.arg_names:
        kind = f"*{number}"
        if name in constants:
            kind = "constexpr"
        elif name in INTEGERS:
            kind = "i32"
        elif name == "keys":
            kind = "*i64" if number == "fp64" else "*i32"
        elif name == "counts" or (name == "latents" and "keys" in program.arg_names):
            kind = "*i32"
        elif name in PLACES:
            kind = "*i64"
        elif program is sums.adamw and name not in ("weights", "mean", "power", "gradient"):
            kind = "fp32"
        found[name] = kind
    return found


def build(architecture, program, number, **constants):
    source = ASTSource(program, signature=types(program, constants, number), constexprs=constants)
    made = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8}
    )
    print(program.__name__, number, f"sm_{architecture}", len(made.asm["cubin"]), "bytes")


def main(architectures):
    for architecture in architectures:
        for number in ("fp32", "bf16"):
            for signed in (False, True):
                build(
                    architecture, selection.candidates, number, SIGNED=signed, WIDE=False, TILE=4096
                )
            build(architecture, selection.ranked, number, ROOM=128, PART=64)
        wide = {"WIDTH": 4096}
        for error in (False, True):
            build(architecture, sums.decoded, "fp32", ERROR=error, **wide)
        build(architecture, sums.row_dots, "fp32", **wide)
        build(architecture, sums.gradient_parts, "fp32", **wide)
        for unit in (False, True):
            build(architecture, sums.latent_gradients, "fp32", UNIT=unit, **wide)
            build(architecture, sums.gradients_of_parts, "fp32", UNIT=unit, **wide)
            build(architecture, sums.adamw, "fp32", UNIT=unit, WIDTH=1024)


if __name__ == "__main__":
    main([int(given) for given in sys.argv[1:]] or ARCHITECTURES)
