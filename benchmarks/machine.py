"""Description of this machine, and its measured limits."""

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import trees
from benchmarks.config import Sizes
from benchmarks.programs import compile_program
from benchmarks.timing import compare

PACKAGES = ("dtnh_jax", "jax", "jaxlib", "optax", "flax", "numpy", "torch", "torchjd")


class Ceilings(NamedTuple):
    """The measured limits of the machine.

    Attributes:
        copy: Bytes read and written per second when copying an array.
        triad: Bytes read and written per second when computing ``a + λ b``.
        read: Bytes read per second when computing an inner product.
        matmul: Floating-point operations per second of a matrix product, by dtype.
    """

    copy: float
    triad: float
    read: float
    matmul: dict[str, float]


def ceilings(sizes: Sizes) -> Ceilings:
    """Measures the limits."""
    # On a CPU, memory for a large result is newly allocated and zeroed in each call; smaller arrays
    # are allocated from memory that is reused.
    cpu = jax.default_backend() == "cpu"
    n_pieces = max(1, sizes.ceiling_megabytes // 4) if cpu else 1
    n = sizes.ceiling_megabytes * 10**6 // 4 // n_pieces * n_pieces
    a, b = (trees.random_like([_floats(n // n_pieces)] * n_pieces, seed) for seed in range(2))
    runs = {
        "copy": (lambda a: [1.5 * x for x in a], a),
        "triad": (lambda a, b: [x + 0.1 * y for x, y in zip(a, b, strict=True)], a, b),
        "read": (lambda a, b: [jnp.sum(x * y) for x, y in zip(a, b, strict=True)], a, b),
    }
    dtypes = ("float32",) if cpu else ("float32", "bfloat16")
    for dtype in dtypes:
        square = trees.random_like(_floats(sizes.matmul_size, sizes.matmul_size), 0).astype(dtype)
        runs[dtype] = (jnp.matmul, square, square)
    calls = {
        name: functools.partial(compile_program(*run).compiled, *run[1:])
        for name, run in runs.items()
    }
    samples = compare(calls, seconds=sizes.seconds / 4, repetitions=sizes.repetitions)
    return Ceilings(
        copy=8 * n / samples["copy"].median,
        triad=12 * n / samples["triad"].median,
        read=8 * n / samples["read"].median,
        matmul={dtype: 2 * sizes.matmul_size**3 / samples[dtype].median for dtype in dtypes},
    )


def describe() -> dict[str, str]:
    """The device, the versions and the load of the machine."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    kind = jax.devices()[0].device_kind
    return {
        "device": f"{jax.device_count()} × {kind} ({jax.default_backend()})",
        "cores": str(cores()),
        "load at the start": load,
        "python": platform.python_version(),
    } | {package: of_package for package in PACKAGES if (of_package := _version(package))}


def cores() -> int:
    """The number of cores that are available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
