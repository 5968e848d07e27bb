"""What this machine is, and the most that it does."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.config import Sizes
from benchmarks.programs import compile_program
from benchmarks.timing import compare

PACKAGES = ("dtnh_jax", "jax", "jaxlib", "optax", "flax", "numpy", "torch", "torchjd")


class Ceilings(NamedTuple):
    """The machine's own limits, as measured.

    Attributes:
        copy: Bytes a second that are read and written, as an array is copied.
        triad: Likewise, as the sum of two arrays is written: what the weighted sum does.
        read: Bytes a second that are read, as the inner product of two arrays is taken.
        matmul: By dtype, floating-point operations a second.
    """

    copy: float
    triad: float
    read: float
    matmul: dict[str, float]


def ceilings(sizes: Sizes) -> Ceilings:
    """Measures them."""
    n = sizes.ceiling_megabytes * 10**6 // 4
    key = jax.random.key(0)
    a, b = (jax.random.normal(each, n) for each in jax.random.split(key))
    programs = {
        "copy": compile_program(lambda a: 1.5 * a, a),
        "triad": compile_program(lambda a, b: a + 0.1 * b, a, b),
        "read": compile_program(lambda a, b: jnp.sum(a * b), a, b),
    }
    dtypes = ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")
    for dtype in dtypes:
        square = jax.random.normal(key, (sizes.matmul_size,) * 2).astype(dtype)
        programs[dtype] = compile_program(jnp.matmul, square, square)
    samples = compare(
        programs, seconds=sizes.seconds / 4, repetitions=sizes.repetitions
    )
    return Ceilings(
        copy=8 * n / samples["copy"].median,
        triad=12 * n / samples["triad"].median,
        read=8 * n / samples["read"].median,
        matmul={dtype: 2 * sizes.matmul_size**3 / samples[dtype].median for dtype in dtypes},
    )


def describe() -> dict[str, str]:
    """The device, the versions, and how busy the machine was."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""),
        "load at the start": load,
        "python": platform.python_version(),
    } | {package: of_package for package in PACKAGES if (of_package := _version(package))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
