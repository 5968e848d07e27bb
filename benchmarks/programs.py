"""Compiled programs and their statistics."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import hlo


class Program(NamedTuple):
    """A compiled function.

    Attributes:
        compiled: The compiled function.
        lower_seconds: The time of tracing and lowering.
        compile_seconds: The time of compilation.
    """

    compiled: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float

    @property
    def hlo(self) -> hlo.Module:
        """The optimized program."""
        return hlo.parse(self.compiled.as_text() or "")

    def memory(self, unit: float) -> dict[str, float]:
        """The memory of the compiled program, in units of ``unit`` bytes."""
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
    """Compiles a function for its arguments, and measures the time.

    Args:
        function: A function of pytrees of arrays.
        arguments: Arrays, or their shapes.
        donate: The indices of donated arguments.

    Returns:
        The program.
    """
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, middle - start, time.perf_counter() - middle)
