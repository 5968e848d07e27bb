"""Programs compiled for TPUs and for an H100, on a machine without either. Nothing is run.

Each program is compiled by a process of its own, since a compiler may abort or take too long.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks import combination, hlo, scaling, step, trees
from benchmarks.config import Layout, Regularizer, Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Row, Table

INSTALL = "pip install 'dtnh_jax[accelerators]'"
H100 = "h100"
# No answer is waited for from the machine that a TPU would be in, nor for a process that compiles,
# too. libtpu knows the topologies of all generations, whichever this one is.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # which asks the driver, where there is none
}
# A GpuTargetConfigProto of XLA, with the numbers of NVIDIA's data sheet and programming guide.
H100_CONFIG = """
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
# What moves data beside the computation, or only waits for that.
MOVES = ("-start", "-done", "-update")

L2_SP = ("weighted_sum, closed form", "dtnh layer, closed form")
STEPS: dict[Regularizer, tuple[str, ...]] = {
    "l2_sp": (
        *L2_SP, "no regularizer", step.BASE, "weighted_sum", "dtnh layer",
        step.PRESET, step.WITH_HELD_OUT,
    ),
    "distillation": ("weighted_sum", "dtnh layer", step.BASE, step.PRESET),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
        target: A topology of TPUs, such as ``v5e:2x2``, or ``h100``.
        tree: The tree of a combination, or the architecture of a step.
        contestant: The name of the contestant.
        regularizer: That of a step; ``None`` for a combination.
        layout: Of a step on all devices; ``None`` for one device.
        sizes: Of a step.
    """

    target: str
    tree: str
    contestant: str
    regularizer: Regularizer | None
    layout: Layout | None
    sizes: Sizes

    def lowered(self, devices: list[Any]) -> jax.stages.Lowered:
        """The program for the devices of the target, before it is compiled."""
        mesh = scaling.mesh_of(devices if self.layout else devices[:1], self.layout or "replicated")
        if self.regularizer is None:
            return scaling.combination_on(mesh, self.tree, self.contestant)
        sizes = dataclasses.replace(self.sizes, batch_size=self.sizes.batch_size * mesh.size)
        config = step.network_of(self.tree, sizes)
        return scaling.step_on(mesh, config, self.regularizer, self.contestant, sizes)

    @property
    def unit(self) -> tuple[int, int]:
        """The number of leaves of the params, and their bytes."""
        if self.regularizer is None:
            shapes = trees.tree(self.tree)
        else:
            config = step.network_of(self.tree, self.sizes)
            shapes = step.shapes_of(config, self.sizes)[0].params
        return len(jax.tree.leaves(shapes)), trees.n_bytes(shapes)

    @property
    def where(self) -> Row:
        """The cells that say which program this is."""
        work = "combination" if self.regularizer is None else f"step, {self.regularizer}"
        return {
            "target": self.target if self.layout else f"one {self.target.split(':')[0]}",
            "layout": self.layout,
            "program": f"{work}, {self.tree}",
            "contestant": self.contestant,
        }


def devices_of(target: str) -> list[Any]:
    """The devices of a target, for which programs can be compiled but not run."""
    if target == H100:
        found = topologies.get_topology_desc(
            H100, platform="cuda", topology="1x1x1", target_config=H100_CONFIG
        )
    else:
        found = topologies.get_topology_desc(target, platform="tpu")
    return list(found.devices)


def missing(target: str) -> str | None:
    """Why nothing can be compiled for a target, if its compiler is not installed."""
    plugin = "jax_cuda12_plugin" if target == H100 else "libtpu"
    return None if importlib.util.find_spec(plugin) else f"{plugin} is not installed: {INSTALL}"


def measure(lowered: jax.stages.Lowered, n_leaves: int, n_bytes: int) -> Row:
    """Compiles a program, and describes it.

    Args:
        lowered: The program.
        n_leaves: The number of leaves of the params.
        n_bytes: Their size.

    Returns:
        Cells: sizes are of one device. The compilation is measured in seconds of the processor,
        which do not depend on what else the machine does.
    """
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    program = hlo.parse(compiled.as_text() or "")
    launched = program.launched()
    usual, _ = program.collectives()
    others = sum(
        n
        for opcode, n in launched.items()
        if opcode != "fusion" and opcode not in hlo.COLLECTIVES and not opcode.endswith(MOVES)
    )
    memory: Any = compiled.memory_analysis()
    # XLA has no such analysis of a program for a GPU.
    cost: Any = compiled.cost_analysis() or {}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "fusions / leaf": launched["fusion"] / n_leaves,
        "other instructions / leaf": others / n_leaves,
        "fusions": launched["fusion"],
        "other instructions": others,
        "GB accessed": cost["bytes accessed"] / 1e9 if "bytes accessed" in cost else None,
        "trees accessed": cost["bytes accessed"] / n_bytes if "bytes accessed" in cost else None,
        "TFLOP": cost["flops"] / 1e12 if "flops" in cost else None,
        "temporary trees": memory.temp_size_in_bytes / n_bytes,
        "temporary GB": memory.temp_size_in_bytes / 1e9,
        "memory GB": (held + memory.temp_size_in_bytes) / 1e9,
        "collectives": ", ".join(f"{n} {kind}" for kind, n in sorted(usual.counts.items())),
        "collective MB": usual.n_bytes / 1e6,
        "compile s": seconds,
    }


def compiled(job: Job, sizes: Sizes) -> Row:
    """The row of a program, from another process; what was compiled before is not compiled anew."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.accelerators"],
            input=json.dumps({"job": dataclasses.asdict(job), "compiled": sizes.compiled}),
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=sizes.target_seconds,
        )
    except subprocess.TimeoutExpired:
        return job.where | {"not compiled": f"not within {sizes.target_seconds:g} s"}
    if done.returncode:
        # A compiler that aborts writes a stack after its error.
        lines = [line for line in done.stderr.splitlines() if "rror" in line or "Check" in line]
        return job.where | {"not compiled": (lines or ["aborted"])[-1][:200]}
    return job.where | json.loads(done.stdout.splitlines()[-1])


def main(job: Job, folder: Path) -> Row:
    """Compiles a program, or reads what was found when the same one was compiled."""
    lowered = job.lowered(devices_of(job.target))
    plugin = "jax_cuda12_plugin" if job.target == H100 else "libtpu"
    key = "\n".join([job.target, plugin, version(plugin), version("jaxlib"), lowered.as_text()])
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(lowered, *job.unit)))
    return json.loads(file.read_text())


def table(
    name: str, title: str, about: str, jobs: list[Job], base: dict[str | None, str], sizes: Sizes
) -> Table:
    """Compiles programs, and holds each against the base of its regularizer."""
    rows: list[Row] = []
    reasons = {target: missing(target) for target in dict.fromkeys(job.target for job in jobs)}
    for job in jobs:
        if not reasons[job.target]:
            row = compiled(job, sizes)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    for row, job in zip(rows, [job for job in jobs if not reasons[job.target]], strict=True):
        is_whole = job.contestant == combination.PRESET and job.regularizer is None
        where = job.where | {"contestant": combination.SGD if is_whole else base[job.regularizer]}
        of_base = next((each for each in rows if where.items() <= each.items()), {})
        for column in ("fusions", "GB accessed", "collective MB", "memory GB", "compile s"):
            mine, bases = row.get(column), of_base.get(column)
            if isinstance(mine, int | float) and isinstance(bases, int | float) and bases:
                row[f"{column}, × base"] = mine / bases
    left_out = "".join(f" Nothing for {each}: {why}." for each, why in reasons.items() if why)
    return Table(name, title, about + left_out, rows)


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Compiles every rule, on one device."""
    del ceilings
    jobs = [
        Job(target, tree, contestant, None, None, sizes)
        for target in sizes.targets
        for tree in sizes.trees
        for contestant in of_combination(target, tree, sizes)
    ]
    return table(
        "accelerators",
        "The combination, compiled for accelerators",
        "Compiled for one device; nothing was run. Fusions: kernels; others: instructions "
        "between them, on a TPU mostly of its scalar unit. Bytes are those of XLA's cost analysis, "
        "which counts the padding of layouts, and which it has for TPUs only. Compile s: of the "
        f"processor. × base: relative to {combination.BASE}, or for dtnh_sgd to SGD with momentum "
        "on the weighted sum.",
        jobs,
        {None: combination.BASE},
        sizes,
    )


def of_combination(target: str, tree: str, sizes: Sizes) -> list[str]:
    """The contestants on a tree; all rules only on the first target of a kind."""
    firsts = {next((each for each in sizes.targets if each != H100), H100), H100}
    if tree in sizes.all_rules_on and target in firsts:
        known = combination.contestants(all_rules=True)
        return [name for name in known if not name.startswith("ml-bloop")]
    return [combination.BASE, "dtnh layer", "dtnh global", "dtnh element, diagnostics=False"]


def run_steps(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Compiles training steps, on one device and on slices."""
    del ceilings
    architecture, image_size, batch_size, activations = sizes.target_step
    of_step = dataclasses.replace(
        sizes, image_size=image_size, batch_size=batch_size, activations=activations
    )
    places: list[tuple[str, Layout | None]] = [
        *((target, "replicated") for target in sizes.slices),
        *((target, None) for target in sizes.targets[:1]),
        *((target, None) for target in sizes.targets[1:] if target == H100),
        *((target, "sharded") for target in sizes.slices),
    ]
    jobs = [
        Job(target, architecture, contestant, regularizer, layout, of_step)
        for target, layout in places
        for regularizer in sizes.regularizers
        for contestant in STEPS[regularizer]
    ]
    return table(
        "accelerator_steps",
        "The training step, compiled for accelerators",
        f"{architecture}, {batch_size} images of {image_size} px for each device, activations "
        f"{activations}, SGD with momentum, state donated; nothing was run. Replicated: data "
        "parallel; sharded: params and state are cut over all devices, too. All sizes are of one "
        f"device. × base: relative to {L2_SP[0]} of L2-SP, and weighted_sum of distillation.",
        jobs,
        {"l2_sp": L2_SP[0], "distillation": "weighted_sum"},
        sizes,
    )


if __name__ == "__main__":
    given = json.load(sys.stdin)
    of_sizes = given["job"].pop("sizes")
    print(json.dumps(main(Job(**given["job"], sizes=Sizes(**of_sizes)), Path(given["compiled"]))))
