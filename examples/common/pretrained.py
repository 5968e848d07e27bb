"""Loads pre-trained ResNets from safetensors files and the Hugging Face hub, and saves them."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from huggingface_hub.errors import EntryNotFoundError

from examples.common import files, resnet
from examples.common.resnet import IMAGENET_PLANS, Network, Plan, ResNetConfig, plan_of

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
LeafPath = tuple[str, ...]


class Pretrained(NamedTuple):
    """A pre-trained network.

    Attributes:
        config: The network, in float32.
        network: Its arrays, with its own head.
        metadata: ``architecture``, ``n_classes`` and the header of the file; and, if a
            ``config.json`` contains them, ``class_names``, ``image_size``, ``mean`` and ``std``,
            in JSON.
    """

    config: ResNetConfig
    network: Network
    metadata: dict[str, str]


def load(name_or_path: str, *, revision: str | None = None) -> Pretrained:
    """Loads a ResNet.

    The architecture is inferred from the keys, which are those of torchvision and timm, of Hugging
    Face transformers, or of akamaster/pytorch_resnet_cifar10. A network that this project would
    compute differently is refused.

    Args:
        name_or_path: A ``.safetensors`` file, a folder that has a ``model.safetensors``, or a name
            on the hub such as ``timm/resnet18.a1_in1k``. An existing path takes precedence.
        revision: A branch, tag or commit on the hub.

    Returns:
        The network. Its arrays are converted to float32.

    Raises:
        FileNotFoundError: If there is no such path, and the hub does not provide it either.
        ValueError: If the file is damaged, or has a missing, unused or mis-shaped key, or its
            ``config.json`` describes another network.
    """
    weights, description = _locate(name_or_path, revision)
    arrays, header = _read(weights)
    config = _infer_config(arrays, weights)
    network = _from_torch(arrays, config, weights)
    metadata = _metadata(description, config, weights)
    return Pretrained(config, network, header | metadata)


def with_new_head(source: Pretrained, n_classes: int, seed: int) -> tuple[ResNetConfig, Network]:
    """Replaces the head of a source by a random one for ``n_classes``."""
    config = dataclasses.replace(source.config, n_classes=n_classes)
    params = source.network.params | {"head": resnet.init_head(config, seed)}
    return config, source.network._replace(params=params)


def export(
    path: str | Path, config: ResNetConfig, network: Network, *, metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file that PyTorch and `load` can read, atomically.

    Args:
        path: The file, in a folder that exists.
        config: The network; its architecture and number of classes are put into the header.
        network: Its arrays. They get the names of torchvision, or of akamaster for CIFAR.
        metadata: More entries of the header.
    """
    arrays = {
        _torchvision_key(path, config): _transposed(np.asarray(leaf), _TO_TORCH)
        for path, leaf in _leaves(network).items()
    }
    header = {**metadata, **_metadata({}, config, Path(path))}
    files.write(Path(path), safetensors.numpy.save(arrays, header))


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and the ``config.json`` of its folder."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        path = _download(name_or_path, revision)
    elif revision is not None:
        raise ValueError(
            f"revision={revision!r} is for a name on the Hugging Face hub, but {path} is a path on "
            "this machine. Leave the revision out, or rename the path."
        )
    if path.is_file():
        return path, {}
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"There is no {WEIGHTS} in {path}. Give the path of a file.")
    description = path / DESCRIPTION
    if not description.is_file():
        return path / WEIGHTS, {}
    try:
        return path / WEIGHTS, dict(json.loads(description.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description} is no JSON object: {error}") from error


def _download(name: str, revision: str | None) -> Path:
    """Downloads a network from the hub; returns its folder."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.endswith((".safetensors", ".pth")):
        raise FileNotFoundError(
            f"There is no file or folder {name!r}, and a name on the Hugging Face hub looks like "
            "timm/resnet18.a1_in1k."
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=[WEIGHTS, DESCRIPTION]
            )
        )
    except (OSError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {name!r}, and the Hugging Face hub did not give it "
            f"(revision: {revision or 'the newest'}). Check the name, or download its {WEIGHTS} "
            "where the hub can be reached and give the path of that file."
        ) from error


def _read(weights: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(weights, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return arrays, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{weights} is damaged or no safetensors file ({error}). A PyTorch checkpoint becomes "
            "one with safetensors.torch.save_file(torch.load(checkpoint), file)."
        ) from error


def _infer_config(arrays: Mapping[str, np.ndarray], weights: Path) -> ResNetConfig:
    """Infers the network from the names and shapes of its arrays."""
    blocks: dict[str, int] = {}
    for key in arrays:
        if found := re.search(r"\b(?:layer|stages\.)(\d)\.(?:layers\.)?(\d+)\.", key):
            stage, block = found.groups()
            blocks[stage] = max(blocks.get(stage, 0), int(block) + 1)
    wanted = Plan(
        blocks=tuple(n for _, n in sorted(blocks.items())),
        bottleneck=any(re.search(r"\.(conv3|layer\.2)\.", key) for key in arrays),
        cifar=len(blocks) == 3,
    )
    plans = dict(IMAGENET_PLANS)
    if wanted.cifar:
        architecture = f"cifar_resnet{6 * wanted.blocks[0] + 2}"
        plans[architecture] = plan_of(architecture)
    architecture = next((name for name, plan in plans.items() if plan == wanted), None)
    if architecture is None:
        raise ValueError(
            f"{weights} is no ResNet that is known here: by its keys it has "
            f"{wanted.blocks or 'no'} {'bottleneck' if wanted.bottleneck else 'basic'} blocks a "
            f"stage. Known are {', '.join(IMAGENET_PLANS)}, and cifar_resnetN, which has the same "
            "number of basic blocks in each of three stages."
        )

    def n_outputs(layer: str) -> int | None:
        name = rf"(module\.)?({layer})\.(weight|bias)"
        of_layer = (array for key, array in arrays.items() if re.fullmatch(name, key))
        return next((len(array) for array in of_layer if array.ndim > 0), None)

    config = ResNetConfig(architecture, n_outputs(r"fc|linear|classifier\.1") or 1)
    width = n_outputs(r"conv1|resnet\.embedder\.embedder\.convolution") or n_outputs(
        r"bn1|resnet\.embedder\.embedder\.normalization"
    )
    is_usual = width in (None, config.first_width)
    return config if is_usual else dataclasses.replace(config, width=width)


def _from_torch(arrays: Mapping[str, np.ndarray], config: ResNetConfig, weights: Path) -> Network:
    """Makes a network of the arrays, which must match its own exactly."""
    shapes = _leaves(jax.eval_shape(lambda: resnet.init(config, 0)))
    is_huggingface = any("encoder.stages." in key for key in arrays)
    prefix = "module." if all(key.startswith("module.") for key in arrays) else ""
    names = {
        path: _huggingface_key(path) if is_huggingface else _torchvision_key(path, config)
        for path in shapes
    }
    paths = {prefix + name: path for path, name in names.items()}
    # These counters are for batch norm without momentum, which is not used here.
    counters = {
        key.replace("running_mean", "num_batches_tracked")
        for key in paths
        if key.endswith("running_mean")
    }
    faults = [f"missing: {key}" for key in sorted(paths.keys() - arrays.keys())]
    faults += [f"unused: {key}" for key in sorted(arrays.keys() - paths.keys() - counters)]
    leaves = {}
    for key in sorted(paths.keys() & arrays.keys()):
        shape = shapes[paths[key]].shape
        wanted = tuple(shape[axis] for axis in _TO_TORCH.get(len(shape), range(len(shape))))
        if arrays[key].shape != wanted:
            faults.append(f"mis-shaped: {key} is {arrays[key].shape}, and should be {wanted}")
        elif not jnp.issubdtype(arrays[key].dtype, jnp.floating):
            faults.append(f"mis-typed: {key} is {arrays[key].dtype}, and should be floating point")
        else:
            leaves[paths[key]] = jnp.asarray(
                _transposed(arrays[key], _FROM_TORCH).astype(np.float32)
            )
    if faults:
        raise ValueError(
            f"{weights} is not the {config.architecture} that is computed here, which its keys are "
            f"closest to:\n  " + "\n  ".join(faults)
        )
    averages = {path: leaves.pop(path) for path in list(leaves) if path[-1] in ("mean", "var")}
    return Network(*(traverse_util.unflatten_dict(tree) for tree in (leaves, averages)))


def _metadata(
    description: Mapping[str, Any], config: ResNetConfig, weights: Path
) -> dict[str, str]:
    """The metadata besides the header; checks that ``config.json`` agrees with the keys."""
    # Networks can have the same keys and be computed differently.
    as_computed = {
        "architecture": config.architecture,
        "model_args": {},
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
    }
    others = {
        name: description[name]
        for name, wanted in as_computed.items()
        if description.get(name, wanted) != wanted
    }
    if others:
        raise ValueError(
            f"{weights} has the keys of {config.architecture}, but the {DESCRIPTION} beside it "
            f"says {others}, and this project computes {as_computed}. If both are the same "
            "network, give the path of the file instead of its folder's or the hub's name."
        )
    of_timm = description.get("pretrained_cfg", description)
    labels = description.get("id2label", {})
    known = {
        "class_names": [labels[key] for key in sorted(labels, key=int)] or None,
        "image_size": of_timm.get("input_size", [None])[-1],
        "mean": of_timm.get("mean"),
        "std": of_timm.get("std"),
    }
    return {
        "architecture": config.architecture,
        "n_classes": str(config.n_classes),
        **{name: json.dumps(value) for name, value in known.items() if value is not None},
    }


# The axes of the kernels of convolutions and linear layers; other arrays have one axis.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}


def _transposed(array: np.ndarray, axes: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    # safetensors ignores strides and writes the memory as it is.
    return np.ascontiguousarray(array.transpose(axes.get(array.ndim, (0,))))


def _leaves(network: Network) -> dict[LeafPath, Any]:
    params, batch_stats = (traverse_util.flatten_dict(tree) for tree in network)
    return params | batch_stats


def _torchvision_key(path: LeafPath, config: ResNetConfig) -> str:
    *layer, leaf = path
    if layer == ["head"]:
        layer = ["linear" if config.plan.cifar else "fc"]
    return ".".join((*layer, _TORCH_LEAVES[leaf]))


def _huggingface_key(path: LeafPath) -> str:
    *parents, layer, leaf = path
    kind = "normalization" if layer == "1" or layer.startswith("bn") else "convolution"
    if layer == "head":
        name = "classifier.1"
    elif not parents:
        name = f"resnet.embedder.embedder.{kind}"
    else:
        stage, block, *downsample = parents
        part = "shortcut" if downsample else f"layer.{int(layer[-1]) - 1}"
        name = f"resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{block}.{part}.{kind}"
    return f"{name}.{_TORCH_LEAVES[leaf]}"


_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
