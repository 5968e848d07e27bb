"""What JAX has no public name for. Everything here is tested on the oldest and the newest JAX."""

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from dtnh_jax._tree import PyTree


def depends_on(fun: Callable[..., Any], tree: PyTree) -> list[bool]:
    """For each leaf of ``tree`` whether the output of ``fun(tree)``, one array, depends on it."""
    # What dead-code elimination finds unused, it finds so through jit, scan and remat too.
    _, used = dce_jaxpr(jax.make_jaxpr(fun)(tree).jaxpr, used_outputs=[True])
    return used


def traced_by(x: Any) -> str:
    """The name and file of the function that ``x`` is traced in; ``""`` if it is not traced."""
    frame = getattr(getattr(x, "_trace", None), "frame", None)
    return getattr(getattr(frame, "debug_info", None), "func_src_info", None) or ""
