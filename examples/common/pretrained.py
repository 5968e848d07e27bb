"""Loads pre-trained ResNets from safetensors files and the Hugging Face hub, and saves them."""

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
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
INDEX = f"{WEIGHTS}.index.json"
LeafPath = tuple[str, ...]
# Where the name of an array begins, after the prefixes of modules around the network.
_NAME = re.compile(
    r"(conv1|bn1|layer\d+|fc|linear|classifier\.1|(resnet\.)?(embedder\.embedder|encoder\.stages))\."
)
# Layers after the network: other heads, and what self-supervised training adds.
_HEADS = re.compile(
    r"(fc|linear|classifier|heads?|project\w*|predict\w*|prototypes|mlp|queue\w*)\b"
)
_LISTED = 10
_CONVERT = "safetensors.torch.save_file(torch.load(checkpoint), file)"


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


def load(name_or_path: str, *, revision: str | None = None, needs_head: bool = True) -> Pretrained:
    """Loads a ResNet.

    The architecture is inferred from the keys, which are those of torchvision and timm, of Hugging
    Face transformers, or of akamaster/pytorch_resnet_cifar10, after prefixes such as ``module.``.
    A network that this project would compute differently is refused.

    Args:
        name_or_path: A ``.safetensors`` file, a folder that has a ``model.safetensors`` or the
            index of its shards, or a name on the hub such as ``timm/resnet18.a1_in1k``. An existing
            path takes precedence.
        revision: A branch, tag or commit on the hub.
        needs_head: Whether the network must have its head. If not, a missing one becomes zeros with
            one logit, and layers of another head are left out with a warning.

    Returns:
        The network. Its arrays are converted to float32.

    Raises:
        FileNotFoundError: If there is no such path, and the hub does not provide it either.
        ValueError: If the file is damaged, or has a missing, unused or mis-shaped key, or numbers
            that are not finite, or its ``config.json`` describes another network.
    """
    weights, description = _locate(name_or_path, revision)
    arrays, header = _read(weights)
    keys = _without_prefixes(arrays, weights)
    arrays = {name: arrays[key] for name, key in keys.items()}
    config = _infer_config(arrays, weights)
    network = _from_torch(arrays, keys, config, weights, needs_head)
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
        if re.search(r"-\d+-of-\d+\.safetensors$", path.name) and (path.parent / INDEX).is_file():
            raise ValueError(f"{path} is one of several shards: give the folder, {path.parent}.")
        return path, {}
    weights = next((path / name for name in (WEIGHTS, INDEX) if (path / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"There is no {WEIGHTS} in {path}. {_advice(path)}")
    description = path / DESCRIPTION
    if not description.is_file():
        return weights, {}
    try:
        return weights, dict(json.loads(description.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description} is no JSON object: {error}") from error


def _advice(folder: Path) -> str:
    """What to do in a folder without weights of the usual name."""
    names = sorted(entry.name for entry in folder.iterdir())
    for extensions, advice in (
        ((".safetensors",), "give the path of that file."),
        ((".bin", ".pth", ".pt", ".ckpt", ".tar"), f"convert it with {_CONVERT}."),
    ):
        if found := [name for name in names if name.endswith(extensions)]:
            return f"It has {', '.join(found[:3])}: {advice}"
    return "Give the path of a file."


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
    """All arrays and the header of a file, or of the shards that an index lists."""
    if weights.name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(weights.read_bytes())["weight_map"].values()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{weights} is no index of shards: {error!r}") from error
        if missing := [name for name in shards if not (weights.parent / name).is_file()]:
            raise FileNotFoundError(f"{weights} lists {', '.join(missing)}, which is not there.")
        parts = [_read(weights.parent / name) for name in shards]
        arrays = {key: array for part, _ in parts for key, array in part.items()}
        return arrays, parts[0][1] if parts else {}
    try:
        with safetensors.safe_open(weights, framework="np") as file:
            arrays = {key: _read_array(file, key, weights) for key in file.keys()}  # noqa: SIM118
            return arrays, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{weights} is damaged or no safetensors file ({error}). A PyTorch checkpoint becomes "
            f"one with {_CONVERT}."
        ) from error


def _read_array(file: Any, key: str, weights: Path) -> np.ndarray:
    try:
        return file.get_tensor(key)
    except safetensors.SafetensorError:
        raise
    except Exception as error:  # of several types, for dtypes that NumPy lacks
        raise ValueError(
            f"{key} in {weights} is {file.get_slice(key).get_dtype()}, a dtype that cannot be read "
            "here. Save the weights in float32."
        ) from error


def _without_prefixes(arrays: Mapping[str, Any], weights: Path) -> dict[str, str]:
    """The key of each array by its name in the network, without prefixes such as ``module.``.

    Raises:
        ValueError: If a name comes twice, because there are several networks.
    """
    keys: dict[str, str] = {}
    for key in arrays:
        starts = [0, *(found.end() for found in re.finditer(r"\.", key))]
        name = next((key[start:] for start in starts if _NAME.match(key, start)), key)
        if name.startswith(("embedder.", "encoder.stages.")):  # a network without a head
            name = f"resnet.{name}"
        if name in keys:
            raise ValueError(
                f"{weights} has more than one network: {keys[name]} and {key}. Save a file with "
                "the arrays of one of them."
            )
        keys[name] = key
    return keys


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
            f"{weights} is no ResNet that is known here: by its keys ({', '.join([*arrays][:3])}, "
            "...) it has "
            f"{wanted.blocks or 'no'} {'bottleneck' if wanted.bottleneck else 'basic'} blocks a "
            f"stage. Known are {', '.join(IMAGENET_PLANS)}, and cifar_resnetN, which has the same "
            "number of basic blocks in each of three stages."
        )

    def n_outputs(layer: str) -> int | None:
        name = rf"({layer})\.(weight|bias)"
        of_layer = (array for key, array in arrays.items() if re.fullmatch(name, key))
        return next((len(array) for array in of_layer if array.ndim > 0), None)

    config = ResNetConfig(architecture, n_outputs(r"fc|linear|classifier\.1") or 1)
    width = n_outputs(r"conv1|resnet\.embedder\.embedder\.convolution") or n_outputs(
        r"bn1|resnet\.embedder\.embedder\.normalization"
    )
    is_usual = width in (None, config.first_width)
    return config if is_usual else dataclasses.replace(config, width=width)


def _from_torch(
    arrays: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    config: ResNetConfig,
    weights: Path,
    needs_head: bool,
) -> Network:
    """Makes a network of the arrays, which must match its own exactly."""
    shapes = _leaves(jax.eval_shape(lambda: resnet.init(config, 0)))
    is_huggingface = any("encoder.stages." in name for name in arrays)
    paths = {
        _huggingface_key(path) if is_huggingface else _torchvision_key(path, config): path
        for path in shapes
    }
    # These counters are for batch norm without momentum, which is not used here.
    counters = {
        name.replace("running_mean", "num_batches_tracked")
        for name in paths
        if name.endswith("running_mean")
    }
    unused = arrays.keys() - paths.keys() - counters
    head = {name for name, path in paths.items() if path[0] == "head"}
    new_head = not needs_head and not head <= arrays.keys()
    if not needs_head and (others := sorted(name for name in unused if _HEADS.match(name))):
        named = ", ".join(keys[name] for name in others[:3])
        warnings.warn(
            f"{len(others)} arrays of another head in {weights} are left out: {named}.",
            stacklevel=3,
        )
        unused -= set(others)
    if new_head:
        unused -= head
        paths = {name: path for name, path in paths.items() if name not in head}

    prefixes = Counter(key.removesuffix(name) for name, key in keys.items() if key.endswith(name))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    missing = sorted(paths.keys() - arrays.keys())
    faults = _listed("missing", [prefix + name for name in missing])
    faults += _listed("unused", sorted(keys[name] for name in unused))
    leaves, shaped, typed = {}, [], []
    for name in sorted(paths.keys() & arrays.keys()):
        array, shape = arrays[name], shapes[paths[name]].shape
        wanted = tuple(shape[axis] for axis in _TO_TORCH.get(len(shape), range(len(shape))))
        if array.shape != wanted:
            shaped.append(f"{keys[name]} is {array.shape}, and should be {wanted}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            typed.append(f"{keys[name]} is {array.dtype}, and should be floating point")
        else:
            leaves[name] = _transposed(array, _FROM_TORCH).astype(np.float32)
    faults += _listed("mis-shaped", shaped) + _listed("mis-typed", typed)
    if faults:
        no_head = " It has no head, which is needed here." if head & set(missing) else ""
        raise ValueError(
            f"{weights} is not the {config.architecture} that is computed here, which its keys are "
            f"closest to.{no_head}\n  " + "\n  ".join(faults)
        )
    if wrong := [keys[name] for name, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        more = f" and {len(wrong) - 3} more arrays" if wrong[3:] else ""
        raise ValueError(
            f"{weights} has NaN or infinity in {', '.join(wrong[:3])}{more}, so that its "
            "logits are not finite. The training that wrote it diverged: use an earlier checkpoint."
        )
    tree = {paths[name]: jnp.asarray(leaf) for name, leaf in leaves.items()}
    if new_head:
        tree |= {path: jnp.zeros(leaf.shape) for path, leaf in shapes.items() if path[0] == "head"}
    averages = {path: tree.pop(path) for path in list(tree) if path[-1] in ("mean", "var")}
    return Network(*(traverse_util.unflatten_dict(each) for each in (tree, averages)))


def _listed(fault: str, items: Sequence[str]) -> list[str]:
    """A line for each item, but not for hundreds."""
    more = [f"... and {len(items) - _LISTED} more {fault}"] if items[_LISTED:] else []
    return [f"{fault}: {item}" for item in items[:_LISTED]] + more


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
    try:
        of_timm = description.get("pretrained_cfg", description)
        labels = description.get("id2label") or {}
        known = {
            "class_names": [labels[key] for key in sorted(labels, key=int)] or None,
            "image_size": of_timm.get("input_size", [None])[-1],
            "mean": of_timm.get("mean"),
            "std": of_timm.get("std"),
        }
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"The {DESCRIPTION} beside {weights} has not the form of timm's or transformers' "
            f"({error}). Mend it, or give the path of the file of weights."
        ) from error
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
