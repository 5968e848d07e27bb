"""Devices and shardings: the batch is sharded, and with ``fsdp`` the weights are too."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.finetune.config import DeviceConfig

# Smaller arrays are replicated: sending them would take longer than keeping them everywhere.
SMALLEST_TO_SHARD = 2**12


def start_processes(config: DeviceConfig) -> None:
    """Connects the processes of the run. Must run before JAX initializes its devices."""
    if config.coordinator == "auto":
        jax.distributed.initialize()
    elif config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def process() -> dict[str, int]:
    """The index of this process and their number, as arguments of the data pipeline."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def make_mesh(config: DeviceConfig, batch_size: int) -> Mesh:
    """Makes a mesh of all devices of all processes, with the axes ``data`` and ``fsdp``.

    Args:
        config: The size of the axes.
        batch_size: Images in a micro-batch.

    Returns:
        The mesh.

    Raises:
        ValueError: If the mesh does not fit the number of devices, or the batch size is not a
            multiple of it.
    """
    n_devices = jax.device_count()
    data, fsdp = {
        "data": (n_devices, 1),
        "fsdp": (1, n_devices),
    }.get(config.mesh) or map(int, config.mesh.split("x"))
    if data * fsdp != n_devices:
        raise ValueError(
            f"mesh={config.mesh} is for {data * fsdp} devices; there are {n_devices}. Use data or "
            "fsdp, which fit any number."
        )
    if batch_size % n_devices:
        raise ValueError(
            f"{n_devices} devices cannot share {batch_size} images evenly: make batch_size a "
            "multiple of devices × accumulate."
        )
    return Mesh(np.array(jax.devices()).reshape(data, fsdp), ("data", "fsdp"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: along its first axis, over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has."""
    return NamedSharding(mesh, P())


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """The sharding of weights, momenta and averages.

    Args:
        state: A tree of arrays or of their shapes.
        mesh: The devices.

    Returns:
        A tree of shardings. Large arrays are sharded along ``fsdp``, on the longest axis that the
        number of devices divides.
    """
    n_parts = mesh.shape["fsdp"]

    def of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % n_parts == 0]
        if n_parts == 1 or leaf.size < SMALLEST_TO_SHARD or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*("fsdp" if i == longest else None for i in range(leaf.ndim))))

    return jax.tree.map(of, state)


def place(tree: Any, shardings: Any) -> Any:
    """Moves arrays that every process has to the devices, with a sharding for each."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Moves arrays that every process has to every device."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def gather(tree: Any, mesh: Mesh) -> Any:
    """Copies sharded arrays to the memory of every process."""
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree))


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes and dtypes with a sharding for each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
