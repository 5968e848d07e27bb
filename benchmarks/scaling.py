"""Collectives of programs compiled for simulated devices."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import combination, hlo, step, trees
from benchmarks.config import Layout, Regularizer, Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Row, Table
from examples.common.resnet import ResNetConfig
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
            mesh = mesh_of(jax.devices()[:n_devices], layout)
            where: Row = {"devices": n_devices, "layout": layout}
            programs = combinations(sizes.scaling_architecture, mesh)
            if n_devices == max(sizes.devices):
                programs |= steps(sizes, mesh)
            found += [
                where | {"program": name} | cells(of_program)
                for name, of_program in programs.items()
            ]
    return found


def mesh_of(found: Sequence[Any], layout: Layout) -> Mesh:
    """A mesh of devices, for replicated or sharded params."""
    shape = (len(found), 1) if layout == "replicated" else (1, len(found))
    return Mesh(np.array(found).reshape(shape), ("data", "fsdp"))


def cells(program: str) -> Row:
    """The collectives of an optimized program."""
    usual, _ = hlo.parse(program).collectives()
    kinds = [f"{n} {kind}" for kind, n in sorted(usual.counts.items())]
    return {
        "collectives": ", ".join(kinds) or "none",
        "messages": sum(usual.counts.values()),
        "bytes": usual.n_bytes,
    }


def combinations(name: str, mesh: Mesh) -> dict[str, str]:
    """The optimized programs of the combination."""
    return {
        f"combination, {of_contestant}": text(combination_on(mesh, name, of_contestant))
        for of_contestant in COMBINATIONS
    }


def steps(sizes: Sizes, mesh: Mesh) -> dict[str, str]:
    """The optimized programs of training steps."""
    config = step.network_of(sizes.scaling_architecture, sizes)
    return {
        f"step, {regularizer}, {name}": text(step_on(mesh, config, regularizer, name, sizes))
        for regularizer in sizes.regularizers
        for name in STEPS
    }


def text(lowered: jax.stages.Lowered) -> str:
    """The optimized program."""
    return lowered.compile().as_text() or ""


def combination_on(mesh: Mesh, name: str, of_contestant: str) -> jax.stages.Lowered:
    """A contestant of the combination, on one tree and a mesh."""
    params = placed(trees.tree(name), mesh)
    inputs = combination.Inputs(*(params for _ in combination.Inputs._fields))
    contestant = combination.contestants(all_rules=True)[of_contestant]
    arguments = jax.eval_shape(contestant.arguments, inputs)
    return lowered(contestant.function, *placed(arguments, mesh))


def step_on(
    mesh: Mesh, config: ResNetConfig, regularizer: Regularizer, name: str, sizes: Sizes
) -> jax.stages.Lowered:
    """A training step on a mesh, over which the batch is sharded."""
    network, batch = step.shapes_of(config, sizes, multiple_of=mesh.size)
    batch = step.Batch(
        placed(batch.source, mesh),
        *(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=devices.batch_sharding(mesh))
            for leaf in batch[1:]
        ),
    )
    contestant = step.contestants(config, regularizer)[name]
    opt_state = jax.eval_shape(contestant.init, network.params)
    state = placed(step.State(network, opt_state), mesh)
    donate = (0,) if contestant.carries else ()
    return lowered(contestant.function, state, batch, donate=donate)


def lowered(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Lowered:
    """A function for its arguments, with outputs sharded like them."""
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    out = devices.state_sharding(jax.eval_shape(function, *arguments), mesh)
    return jax.jit(function, out_shardings=out, donate_argnums=donate).lower(*arguments)


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of the examples."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        devices.state_sharding(shapes, mesh),
    )


if __name__ == "__main__":
    print(json.dumps(rows(Sizes(**json.load(sys.stdin)))))
