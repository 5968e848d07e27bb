"""Compiled programs, and what they say about themselves."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import hlo


class Program(NamedTuple):
    """A compiled function.

    Attributes:
        compiled: What the compiler made of it; call it like the function.
        lower_seconds: How long tracing and lowering took.
        compile_seconds: How long the compiler took.
    """

    compiled: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float

    @property
    def hlo(self) -> hlo.Module:
        """The optimized program."""
        return hlo.parse(self.compiled.as_text() or "")

    def memory(self, unit: float) -> dict[str, float]:
        """What the compiled program holds, in units of so many bytes."""
        stats: Any = self.compiled.memory_analysis()
        return {
            "arguments": stats.argument_size_in_bytes / unit,
            "outputs": stats.output_size_in_bytes / unit,
            "donated": stats.alias_size_in_bytes / unit,
            "temporary": stats.temp_size_in_bytes / unit,
        }


def compile_program(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> Program:
    """Compiles a function for its arguments, and notes how long that took.

    Args:
        function: A function of trees of arrays.
        arguments: Arrays, or their shapes.
        donate: Which arguments are used up.

    Returns:
        The program.
    """
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, middle - start, time.perf_counter() - middle)
