"""Statistics of an optimized program, parsed from its text."""

import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Instructions that name values and compute nothing.
BOOKKEEPING = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+?\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
        opcode: The opcode, such as ``fusion``.
        n_bytes: The size of the result.
        calls: The computations that it calls, including branches.
    """

    opcode: str
    n_bytes: int
    calls: tuple[str, ...]


class Collectives(NamedTuple):
    """The collectives of a program.

    Attributes:
        counts: The number of collectives by kind; one with several arrays counts once.
        n_bytes: The size of their results on one device.
    """

    counts: dict[str, int]
    n_bytes: int


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: The instructions of each computation, by name.
        entry: The name of the entry computation.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    def count(self, opcode: str) -> int:
        """The number of instructions with an opcode, including those in fusions."""
        return sum(
            each.opcode == opcode
            for instructions in self.computations.values()
            for each in instructions
        )

    def size(self) -> int:
        """The number of instructions, without those that only name values."""
        return sum(
            each.opcode not in BOOKKEEPING
            for instructions in self.computations.values()
            for each in instructions
        )

    def launched(self) -> Counter[str]:
        """The instructions that every run executes, by opcode, without fusions and branches."""
        return Counter(
            each.opcode
            for name in self._launched(branches=False)
            for each in self.computations[name]
            if each.opcode not in BOOKKEEPING
        )

    def launches(self) -> int:
        """The number of instructions that every run executes, without fusions and branches."""
        return self.launched().total()

    def collectives(self) -> tuple[Collectives, Collectives]:
        """The collectives of every run, and those in the branches of conditionals."""
        always = self._launched(branches=False)
        rest = [name for name in self._launched(branches=True) if name not in always]
        return self._collectives(always), self._collectives(rest)

    def _launched(self, *, branches: bool) -> list[str]:
        """The computations that are executed, with or without branches, but not inside fusions."""
        opcodes = {"call", "while", "async-start"} | ({"conditional"} if branches else set())
        reached, waiting = [], [self.entry]
        while waiting:
            name = waiting.pop()
            if name in reached or name not in self.computations:
                continue
            reached.append(name)
            for each in self.computations[name]:
                if each.opcode in opcodes:
                    waiting += each.calls
        return reached

    def _collectives(self, names: list[str]) -> Collectives:
        counts: Counter[str] = Counter()
        n_bytes = 0
        for each in (each for name in names for each in self.computations[name]):
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += 1
                n_bytes += each.n_bytes
        return Collectives(dict(counts), n_bytes)


def parse(text: str) -> Module:
    """Parses the text of an optimized program.

    Args:
        text: The result of ``compiled.as_text()``.

    Returns:
        The program.

    Raises:
        ValueError: If there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, inside = None, None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            inside = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            inside.append(_instruction(found[1]))
    if entry is None:
        raise ValueError(f"The text of a program must have an ENTRY; got {text[:80]!r}...")
    return Module(computations, entry)


def _instruction(text: str) -> Instruction:
    text = re.sub(r"/\*.*?\*/|metadata=\{[^}]*\}", "", text)
    opcode = _OPCODE.search(text)
    if opcode is None:
        raise ValueError(f"An instruction must have an opcode; got {text[:80]!r}.")
    arrays = _ARRAY.findall(text[: opcode.start()])
    if opcode[1] in ("all-gather-start", "collective-permute-start"):
        # Their results are (inputs, outputs, ...).
        arrays = arrays[len(arrays) // 2 :][:1] if len(arrays) > 1 else arrays
    called = _CALLED.findall(text)
    for group in _BRANCHES.findall(text):
        called += [name.strip().lstrip("%") for name in group.split(",")]
    return Instruction(
        opcode[1],
        sum(_size(dtype, shape) for dtype, shape in arrays),
        tuple(dict.fromkeys(called)),
    )


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.ceil(bits / 8 * math.prod(int(size) for size in shape.split(",") if size))
