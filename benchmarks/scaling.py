"""Collectives of programs compiled for simulated devices."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import combination, hlo, step, trees
from benchmarks.config import Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Row, Table
from examples.finetune import devices

COMBINATIONS = (combination.BASE, *(f"dtnh {scope}" for scope in combination.SCOPES))
STEPS = (step.BASE, "dtnh layer")


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Counts collectives, in another process with simulated devices."""
    del ceilings
    flags = os.environ.get("XLA_FLAGS", "")
    n_devices = max(sizes.devices)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling"],
        input=json.dumps(asdict(sizes)),
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            # The last occurrence of a flag is used.
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={n_devices}",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Table(
        "scaling",
        "Communication",
        f"{sizes.scaling_architecture} compiled for simulated CPU devices. The batch is sharded; "
        "params and gradients are replicated or sharded. Bytes are the sizes of the results of "
        "the collectives on one device, per step. Training steps only for "
        f"{n_devices} devices.",
        json.loads(done.stdout),
    )


def rows(sizes: Sizes) -> list[Row]:
    """Computes the rows of the table."""
    found: list[Row] = []
    for n_devices in sizes.devices:
        for layout in sizes.layouts:
            shape = (n_devices, 1) if layout == "replicated" else (1, n_devices)
            mesh = Mesh(np.array(jax.devices()[:n_devices]).reshape(shape), ("data", "fsdp"))
            where: Row = {"devices": n_devices, "layout": layout}
            programs = combinations(sizes.scaling_architecture, mesh)
            if n_devices == max(sizes.devices):
                programs |= steps(sizes, mesh)
            found += [where | {"program": name} | cells(text) for name, text in programs.items()]
    return found


def cells(text: str) -> Row:
    """The collectives of an optimized program."""
    usual, _ = hlo.parse(text).collectives()
    kinds = [f"{n} {kind}" for kind, n in sorted(usual.counts.items())]
    return {
        "collectives": ", ".join(kinds) or "none",
        "messages": sum(usual.counts.values()),
        "bytes": usual.n_bytes,
    }


def combinations(name: str, mesh: Mesh) -> dict[str, str]:
    """The optimized programs of the combination."""
    params = placed(trees.tree(name), mesh)
    inputs = combination.Inputs(*(params for _ in combination.Inputs._fields))
    known = combination.contestants(all_rules=False)
    texts = {}
    for of_contestant in COMBINATIONS:
        contestant = known[of_contestant]
        state = placed(jax.eval_shape(contestant.arguments, inputs), mesh)
        texts[f"combination, {of_contestant}"] = compiled(contestant.function, *state)
    return texts


def steps(sizes: Sizes, mesh: Mesh) -> dict[str, str]:
    """The optimized programs of training steps."""
    config = step.network_of(sizes.scaling_architecture, sizes)
    network, batch = step.shapes_of(config, sizes, multiple_of=mesh.size)
    batch = step.Batch(
        placed(batch.source, mesh),
        *(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=devices.batch_sharding(mesh))
            for leaf in batch[1:]
        ),
    )
    texts = {}
    for regularizer in sizes.regularizers:
        known = step.contestants(config, regularizer)
        for name in STEPS:
            opt_state = jax.eval_shape(known[name].init, network.params)
            state = placed(step.State(network, opt_state), mesh)
            texts[f"step, {regularizer}, {name}"] = compiled(known[name].function, state, batch)
    return texts


def compiled(function: Any, *arguments: Any) -> str:
    """The optimized program, with outputs sharded like the arguments."""
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    out = devices.state_sharding(jax.eval_shape(function, *arguments), mesh)
    return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text() or ""


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of the examples."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        devices.state_sharding(shapes, mesh),
    )


if __name__ == "__main__":
    print(json.dumps(rows(Sizes(**json.load(sys.stdin)))))
