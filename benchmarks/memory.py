"""Memory of the compiled programs and of the optimizer states."""

import jax
import optax

import dtnh_jax
from benchmarks import combination, step, trees
from benchmarks.config import Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Row, Table

REG_WEIGHT = 0.1


def states() -> dict[str, optax.GradientTransformation]:
    """Transformations whose state is measured."""
    sgd = optax.sgd(0.1, momentum=0.9)
    dtnh = dtnh_jax.dtnh(REG_WEIGHT)
    average = optax.ema(0.99)
    return {
        "sgd with momentum": sgd,
        "dtnh": dtnh,
        "dtnh, reference=ema": dtnh_jax.dtnh(REG_WEIGHT, reference=average),
        "bloop": dtnh_jax.bloop(REG_WEIGHT),
        "decoupled(sgd with momentum)": dtnh_jax.decoupled(sgd, REG_WEIGHT, learning_rate=0.1),
        "accumulate_pairs(dtnh, sgd with momentum)": dtnh_jax.accumulate_pairs(
            optax.chain(dtnh, sgd), 4
        ),
        "adam": optax.adam(0.1),
    }


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Measures memory, in units of the tree of params."""
    del ceilings
    rows: list[Row] = []
    for name in sizes.trees:
        unit = trees.n_bytes(trees.tree(name))
        for of_contestant in combination.contestants(all_rules=name in sizes.all_rules_on):
            program = combination.program(name, of_contestant)
            of_program: Row = {"program": f"combination, {name}", "contestant": of_contestant}
            rows.append(of_program | program.memory(unit))
    for architecture in sizes.architectures:
        network, _ = step.shapes_of(step.network_of(architecture, sizes), sizes)
        unit = trees.n_bytes(network.params)
        for regularizer in sizes.regularizers:
            for of_contestant in step.names_of(architecture, regularizer, sizes):
                program = step.program(architecture, regularizer, of_contestant, sizes)
                title = f"step, {architecture}, {regularizer}"
                of_step: Row = {"program": title, "contestant": of_contestant}
                rows.append(of_step | program.memory(unit))
    params = trees.tree(sizes.trees[0])
    for of_state, tx in states().items():
        size = trees.n_bytes(jax.eval_shape(tx.init, params)) / trees.n_bytes(params)
        rows.append({"program": f"state, {sizes.trees[0]}", "contestant": of_state, "state": size})
    return Table(
        "memory",
        "Memory",
        "In units of the tree of params. Temporary: allocated by the compiled program in addition "
        "to arguments and outputs; donated: outputs that reuse the memory of arguments."
        + _device_peak(),
        rows,
    )


def _device_peak() -> str:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return f" Peak memory of the device in this run: {peak / 1e9:.2f} GB." if peak else ""
