"""Performance goals, and whether the measurements meet them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from benchmarks import accelerators, combination, pytorch, step
from benchmarks.machine import Ceilings
from benchmarks.report import Cell, Row, Table


class Goal(NamedTuple):
    """A measured figure and its limit.

    Attributes:
        text: A description.
        figure: The measurement; ``None`` if there is none.
        limit: The maximum of the figure, or its minimum if ``at_least``.
        at_least: Whether the limit is a minimum.
        about: The kind of machine that the goal applies to: ``"cpu"``, ``"accelerator"`` or
            ``"any"``.
    """

    text: str
    figure: float | None
    limit: float
    at_least: bool = False
    about: str = "any"


def run(tables: Mapping[str, Table], ceilings: Ceilings) -> Table:
    """Computes the table of goals from the other tables, by name."""
    here = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    rows: list[Row] = []
    for goal in [
        *of_combination(tables, ceilings),
        *of_compilation(tables),
        *of_steps(tables),
        *of_accelerators(tables),
    ]:
        figure = goal.figure if goal.about in ("any", here) else None
        rows.append(
            {
                "goal": goal.text,
                "limit": f"{'≥' if goal.at_least else '≤'} {goal.limit:g}",
                "figure": figure,
                "": verdict(figure, goal),
            }
        )
    return Table("goals", "Goals", "Ratios are medians over repetitions.", rows)


def verdict(figure: float | None, goal: Goal) -> str:
    """Whether the goal is met."""
    if figure is None:
        return "not measured here"
    is_met = figure >= goal.limit if goal.at_least else figure <= goal.limit
    return "met" if is_met else "not met"


def of_combination(tables: Mapping[str, Table], ceilings: Ceilings) -> Iterator[Goal]:
    """The goals of the combination alone."""
    table = tables.get("combination")

    def cell(column: str, contestant: str, tree: str = "resnet50") -> float | None:
        return table and table.find(column, tree=tree, contestant=contestant)

    where = "combination, ResNet-50"
    for scope, limit in (("layer", 1.5), ("global", 1.8)):
        name = f"dtnh {scope}"
        figure = cell("× weighted sum", name)
        yield Goal(f"{where}, {name}: × weighted_sum", figure, limit, about="cpu")
    for direction, rival, limit in (
        ("bloop_direction", "bloop global", 1.5),
        ("pcgrad_direction", "pcgrad global", 2.0),
    ):
        for name in ("dtnh layer", "dtnh global", rival):
            faster = quotient(1.0, cell(f"× {direction}", name))
            text = f"{where}, {name}: speedup over ml-bloop's {direction}"
            yield Goal(text, faster, limit, at_least=True, about="cpu")
    for scope in ("layer", "global"):
        name = f"dtnh {scope}"
        mine, theirs = (cell("compile s", each) for each in (name, "ml-bloop bloop_direction"))
        text = f"compilation, ResNet-50, {name}: × ml-bloop's bloop_direction"
        yield Goal(text, quotient(mine, theirs), 1.0, about="cpu")
    for tree in ("resnet50", "300M"):
        for scope in ("layer", "global"):
            name = f"dtnh {scope}"
            rate = quotient(cell("GB/s", name, tree), ceilings.copy / 1e9)
            text = f"combination, {tree}, {name}: share of the copy bandwidth"
            yield Goal(text, rate, 0.8, at_least=True, about="accelerator")


def of_compilation(tables: Mapping[str, Table]) -> Iterator[Goal]:
    """The goals of compilation time."""
    table = tables.get("compile")

    def seconds(n_leaves: int, contestant: str) -> float | None:
        lower, compiling = (
            table and table.find(column, leaves=n_leaves, contestant=contestant)
            for column in ("lower s", "compile s")
        )
        return None if lower is None or compiling is None else lower + compiling

    for scope in combination.SCOPES:
        name = f"dtnh {scope}"
        figure = quotient(seconds(2000, name), seconds(100, name))
        yield Goal(f"compilation, {name}: 2000 leaves × 100 leaves", figure, 25.0, about="cpu")


def of_steps(tables: Mapping[str, Table]) -> Iterator[Goal]:
    """The goals of the training step: time, memory, and comparison with PyTorch."""
    times, memory, torch = (tables.get(name) for name in ("step", "memory", "torch"))
    architectures = dict.fromkeys(
        str(row["step"]).split(",")[0] for table in [times] if table for row in table.rows
    )
    for architecture in architectures or ["resnet50"]:
        l2_sp, distillation = (f"{architecture}, {each}" for each in ("l2_sp", "distillation"))

        def cell(column: str, work: str, contestant: str) -> float | None:
            return times and times.find(column, step=work, contestant=contestant)

        def temporary(work: str, contestant: str) -> float | None:
            return memory and memory.find(
                "temporary", program=f"step, {work}", contestant=contestant
            )

        for name in ("dtnh layer", "dtnh layer, closed form"):
            figure = cell("× one gradient", l2_sp, name)
            yield Goal(f"step, {l2_sp}, {name}: × {step.BASE}", figure, 1.02)
        for k, limit in ((4, 1.35), (16, 1.1)):
            figure = cell(f"× {step.PRESET}", l2_sp, step.every(k))
            yield Goal(f"step, {l2_sp}, {step.every(k)}: × {step.PRESET}", figure, limit)
        figure = cell("× floor", distillation, "dtnh layer")
        yield Goal(f"step, {distillation}, dtnh layer: × floor", figure, 1.05)
        for work, name, limit in (
            (l2_sp, "dtnh layer", 1.0),
            (l2_sp, "dtnh layer, closed form", 0.0),
            (distillation, "dtnh layer", 1.0),
        ):
            mine, base = temporary(work, name), temporary(work, step.BASE)
            figure = None if mine is None or base is None else mine - base
            text = f"temporary memory, {work}, {name}: params-sized buffers above {step.BASE}"
            yield Goal(text, figure, limit)
        for work in (l2_sp, distillation):
            figure = torch and torch.find(
                "× dtnh_jax",
                work=f"step, {work}",
                contestant=pytorch.PAIR,
            )
            text = f"step, {work}, dtnh layer: images/s × PyTorch's with two backward passes"
            yield Goal(text, figure, 1.0, at_least=True, about="accelerator")


def of_accelerators(tables: Mapping[str, Table]) -> Iterator[Goal]:
    """The goals of programs that are compiled for accelerators, on any machine."""
    table, steps = (tables.get(name) for name in ("accelerators", "accelerator_steps"))
    element = "dtnh element, diagnostics=False"
    of_tpu = ("dtnh layer", "dtnh layer, diagnostics=False", "dtnh global", element)
    limits = {
        "one v5e": (
            *((name, "fusions / leaf", 1 if name == element else 2) for name in of_tpu),
            *((name, "GB accessed, × base", 1.2) for name in of_tpu),
            (step.PRESET, "GB accessed, × base", 1.9),
            *((name, "temporary trees", 0.05) for name in of_tpu),
            *((name, "compile s, × base", 2) for name in of_tpu),
        ),
        "one h100": tuple(
            (name, column, limit)
            for name in of_tpu
            for column, limit in (("fusions, × base", 1.6), ("compile s, × base", 3))
        ),
    }
    where: dict[str, Cell] = {"program": "combination, resnet50"}
    for target, of_target in limits.items():
        for name, column, limit in of_target:
            figure = table and table.find(column, target=target, contestant=name, **where)
            yield Goal(f"compiled for {target}, ResNet-50, {name}: {column}", figure, limit)
    name = accelerators.L2_SP[1]
    for layout in ("replicated", "sharded"):
        where = {"target": "v5e:16x16", "layout": layout, "program": "step, l2_sp, resnet50"}
        for column, limit in (("collective MB, × base", 1.001), ("memory GB", 16.0)):
            figure = steps and steps.find(column, contestant=name, **where)
            yield Goal(f"step compiled for v5e:16x16, {layout}, {name}: {column}", figure, limit)


def quotient(x: float | None, y: float | None) -> float | None:
    """``x / y``, or ``None`` if one is missing."""
    return None if x is None or y is None else x / y
