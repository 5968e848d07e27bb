"""Which device has what: the batch is shared out, and with ``fsdp`` the weights are too."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.finetune.config import DeviceConfig

# Smaller arrays are not worth a message between devices.
SMALLEST_TO_SHARD = 2**12


def start_processes(config: DeviceConfig) -> None:
    """Joins the other processes of the run, before any device is asked for."""
    if config.coordinator == "auto":
        jax.distributed.initialize()
    elif config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def make_mesh(config: DeviceConfig, batch_size: int) -> Mesh:
    """All devices of all processes, along ``data`` and ``fsdp``.

    Args:
        config: How many there are along each.
        batch_size: Images that they share in a micro-batch.

    Returns:
        The mesh.

    Raises:
        ValueError: If there are not as many devices, or they cannot share the batch evenly.
    """
    n_devices = jax.device_count()
    data, fsdp = {
        "data": (n_devices, 1),
        "fsdp": (1, n_devices),
    }.get(config.mesh) or map(int, config.mesh.split("x"))
    if data * fsdp != n_devices:
        raise ValueError(
            f"mesh={config.mesh} is for {data * fsdp} devices; there are {n_devices}. Take data or "
            "fsdp, which fit any number."
        )
    if batch_size % n_devices:
        raise ValueError(
            f"{n_devices} devices cannot share {batch_size} images evenly: make batch_size a "
            "multiple of devices × accumulate."
        )
    return Mesh(np.array(jax.devices()).reshape(data, fsdp), ("data", "fsdp"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images lie on all devices, along their first axis."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has it whole."""
    return NamedSharding(mesh, P())


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Where each array of the state lies: the same rule for weights, momenta and averages.

    Args:
        state: A tree of arrays or of their shapes.
        mesh: The devices.

    Returns:
        A tree of shardings. Along ``fsdp``, large arrays are cut on their longest axis that it
        divides.
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
    """Puts arrays that every process has whole onto the devices."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)
