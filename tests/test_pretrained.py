# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_torch_fixtures as pytorch

for _package in ("flax", "safetensors"):
    pytest.importorskip(_package)
huggingface_hub = pytest.importorskip("huggingface_hub")

import safetensors.numpy

from examples.common import pretrained, resnet
from examples.common.resnet import ResNetConfig

CONFIGS = [
    ResNetConfig("resnet18", 3, width=4),
    ResNetConfig("resnet34", 2, width=1),
    ResNetConfig("resnet50", 4, width=2),
    ResNetConfig("resnet152", 2, width=1),
    ResNetConfig("cifar_resnet20", 5),
    ResNetConfig("cifar_resnet32", 5, width=3),
]
BASIC, BOTTLENECK, CIFAR = CONFIGS[0], CONFIGS[2], CONFIGS[4]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)


def some_network(config):
    shapes = jax.eval_shape(lambda: resnet.init(config, 0))
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(draws.normal(size=leaf.shape), "f"), shapes)


def exported(config, path, **metadata):
    pretrained.export(path, config, network := some_network(config), metadata=metadata)
    return network


def arrays_of(config, tmp_path):
    exported(config, tmp_path / "exported.safetensors")
    return safetensors.numpy.load_file(tmp_path / "exported.safetensors")


def saved(arrays, folder, name="changed.safetensors"):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / name)
    return str(folder / name)


def assert_equal(network, other):
    assert jax.tree.structure(network) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, network, other)


@every_config
def test_what_was_exported_is_loaded_bit_by_bit(config, tmp_path):
    network = exported(config, tmp_path / "a.safetensors", mean="[0.5, 0.5, 0.5]", task="Ships")
    source = pretrained.load(str(tmp_path / "a.safetensors"))
    assert source.config == config
    assert_equal(source.network, network)
    assert {leaf.dtype for leaf in jax.tree.leaves(source.network)} == {jnp.dtype("float32")}
    assert source.metadata == {
        "architecture": config.architecture,
        "n_classes": str(config.n_classes),
        "mean": "[0.5, 0.5, 0.5]",
        "task": "Ships",
    }
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == source.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_export_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    network = exported(CIFAR, path)
    with pytest.raises(TypeError):
        pretrained.export(path, CIFAR, network, metadata={"epochs": 3})
    assert_equal(pretrained.load(str(path)).network, network)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20"])
def test_an_export_has_the_keys_and_shapes_of_pytorch(name, tmp_path):
    _, state = pytorch.stored(name)
    config, network, metadata = pretrained.load(saved(state, tmp_path))
    assert (config, metadata["n_classes"]) == (ResNetConfig(name, pytorch.N_CLASSES), "7")
    pretrained.export(tmp_path / "b.safetensors", config, network, metadata={})
    again = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    of_pytorch = {key: array for key, array in state.items() if "tracked" not in key}
    assert again.keys() == of_pytorch.keys()
    for key, array in of_pytorch.items():
        np.testing.assert_array_equal(again[key], array)


def test_hugging_face_keys_and_logits(tmp_path):
    facts, state = pytorch.stored("huggingface_resnet50")
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    saved(state, tmp_path, "model.safetensors")
    source = pretrained.load(str(tmp_path))
    assert source.config == ResNetConfig("resnet50", pytorch.N_CLASSES, width=4)
    assert json.loads(source.metadata["class_names"]) == [f"LABEL_{i}" for i in range(7)]
    images = jnp.asarray(pytorch.images("huggingface_resnet50").transpose(0, 2, 3, 1))
    run = jax.jit(resnet.apply, static_argnums=0, static_argnames="train")
    output = run(source.config, source.network, images, train=False)
    np.testing.assert_allclose(output.logits, facts["eval_logits"], atol=1e-4, rtol=0)


def huggingface_key(key):
    """Renames one of torchvision by patterns, as the loader does not."""
    for pattern, replacement in (
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        (r"^fc\.", "classifier.1."),
        (r"layer1\.", "resnet.encoder.stages.0.layers."),
        (r"layer2\.", "resnet.encoder.stages.1.layers."),
        (r"layer3\.", "resnet.encoder.stages.2.layers."),
        (r"layer4\.", "resnet.encoder.stages.3.layers."),
        (r"downsample\.0", "shortcut.convolution"),
        (r"downsample\.1", "shortcut.normalization"),
        (r"conv1", "layer.0.convolution"),
        (r"conv2", "layer.1.convolution"),
        (r"conv3", "layer.2.convolution"),
        (r"bn1", "layer.0.normalization"),
        (r"bn2", "layer.1.normalization"),
        (r"bn3", "layer.2.normalization"),
    ):
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.architecture)
def test_hugging_face_keys_of_basic_blocks(config, tmp_path):
    arrays = arrays_of(config, tmp_path)
    renamed = {huggingface_key(key): array for key, array in arrays.items()}
    source = pretrained.load(saved(renamed, tmp_path))
    assert source.config == config
    assert_equal(source.network, some_network(config))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "encoder.", "timm_model.", "a.b-c.1.")


@pytest.mark.parametrize(
    ("prefix", "config"), [*((prefix, CIFAR) for prefix in PREFIXES), ("resnet.", BASIC)]
)
@pytest.mark.parametrize("of_some", [False, True])
def test_keys_with_any_prefix_are_known(prefix, config, of_some, tmp_path):
    arrays = {
        key if of_some and key.startswith(("fc", "linear", "bn1")) else f"{prefix}{key}": array
        for key, array in arrays_of(config, tmp_path).items()
    }
    arrays[f"{prefix}layer1.0.bn1.num_batches_tracked"] = np.array(3)
    source = pretrained.load(saved(arrays, tmp_path))
    assert source.config == config
    assert_equal(source.network, some_network(config))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_become_float32(dtype, tmp_path):
    arrays = {key: a.astype(jnp.dtype(dtype)) for key, a in arrays_of(BASIC, tmp_path).items()}
    source = pretrained.load(saved(arrays, tmp_path))
    leaves = jax.tree.leaves(source.network)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    for leaf, exact in zip(leaves, jax.tree.leaves(some_network(BASIC)), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(exact).astype(dtype).astype(np.float32))


def test_two_networks_in_a_file_are_refused(tmp_path):
    arrays = arrays_of(CIFAR, tmp_path)
    both = {f"{of}.{key}": array for of in ("student", "teacher") for key, array in arrays.items()}
    with pytest.raises(ValueError, match=r"more than one network: student\.(.*) and teacher\.\1\."):
        pretrained.load(saved(both, tmp_path))


@pytest.mark.parametrize("rename", [str, "backbone.{}".format])
@pytest.mark.parametrize("others", [(), ("fc.0.weight", "projector.2.bias", "queue")])
def test_the_head_is_asked_for_where_it_is_used(rename, others, tmp_path):
    arrays = {rename(key): array for key, array in arrays_of(BOTTLENECK, tmp_path).items()}
    for name in ("fc.weight", "fc.bias"):
        del arrays[rename(name)]
    arrays |= dict.fromkeys(others, np.zeros((2, 2), np.float32))
    path = saved(arrays, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)It has no head, .* missing: (backbone\.)?fc\.bias"):
        pretrained.load(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = pretrained.load(path, needs_head=False)
    told = [str(each.message) for each in caught if "another head" in str(each.message)]
    assert len(told) == bool(others)
    assert all(name in message for message in told for name in others)
    _, network = pretrained.with_new_head(source, n_classes=9, seed=1)
    expected = some_network(BOTTLENECK)
    assert jax.tree.map(jnp.shape, network.params["head"]) == {"kernel": (64, 9), "bias": (9,)}
    assert_equal(network.params | {"head": 0}, expected.params | {"head": 0})
    assert_equal(network.batch_stats, expected.batch_stats)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    arrays = arrays_of(CIFAR, tmp_path)
    arrays["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"NaN or infinity in layer1\.0\.conv1\.weight, .*diverged"
    ):
        pretrained.load(saved(arrays, tmp_path))
    large = {key: array.astype(np.float64) for key, array in arrays_of(CIFAR, tmp_path).items()}
    large["linear.bias"][:] = 1e300
    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match=r"NaN or infinity in linear\.bias"),
    ):
        pretrained.load(saved(large, tmp_path))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_dtype_that_cannot_be_read_is_named(dtype, tmp_path):
    header = {"conv1.weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}
    encoded = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"ab")
    with pytest.raises(ValueError, match=r"conv1\.weight") as error:
        pretrained.load(str(tmp_path / "a.safetensors"))
    if "no ResNet" not in str(error.value):  # a NumPy that has it reads on
        assert dtype in str(error.value)
        assert "float32" in str(error.value)


def test_a_wrong_network_is_told_in_few_lines(tmp_path):
    arrays = arrays_of(BOTTLENECK, tmp_path)
    wrong = {key.replace("conv", "convolution"): array for key, array in arrays.items()}
    wrong |= {"layer1.0.conv3.weight": arrays["layer1.0.conv3.weight"]}
    lines = refusal(wrong, tmp_path).splitlines()
    assert len(lines) <= 1 + 2 * 11
    assert sum("... and " in line for line in lines) == 2


def refusal(arrays, tmp_path):
    with pytest.raises(ValueError, match="safetensors") as error:
        pretrained.load(saved(arrays, tmp_path))
    return str(error.value)


def faults(message):
    return [line.strip() for line in message.splitlines()[1:]]


@pytest.mark.parametrize("rename", [str, huggingface_key, "module.{}".format])
def test_all_faults_are_in_one_error_in_the_words_of_the_file(rename, tmp_path):
    arrays = {rename(key): array for key, array in arrays_of(BOTTLENECK, tmp_path).items()}
    missing = {rename("layer3.5.bn3.running_var"), rename("conv1.weight"), rename("fc.bias")}
    for key in missing:
        del arrays[key]
    unused = {
        rename("layer1.0.se.fc1.weight"): np.zeros((2, 2), np.float32),
        rename("layer1.0.se.num_batches_tracked"): np.array(1),
    }
    conv, bias = rename("layer2.0.conv2.weight"), rename("bn1.bias")
    arrays |= unused
    arrays[conv] = np.zeros((4, 1, 3, 3), np.float32)
    arrays[bias] = np.zeros(2, np.int32)
    message = refusal(arrays, tmp_path)
    assert "resnet50" in message
    assert sorted(faults(message)) == sorted(
        [
            *(f"missing: {key}" for key in missing),
            *(f"unused: {key}" for key in unused),
            f"mis-shaped: {conv} is (4, 1, 3, 3), and should be (4, 4, 3, 3)",
            f"mis-typed: {bias} is int32, and should be floating point",
        ]
    )


def with_deep_stem(arrays):
    """As in timm's resnet50d."""
    arrays["conv1.0.weight"] = arrays.pop("conv1.weight")[:, :, :3, :3]
    arrays["conv1.1.weight"] = arrays["bn1.weight"]


def with_groups(arrays):
    """As in ResNeXt."""
    arrays["layer1.0.conv2.weight"] = arrays["layer1.0.conv2.weight"][:, :1]


def twice_as_wide(arrays):
    """As in Wide ResNet."""
    for layer in ("conv1", "conv2"):
        key = f"layer1.0.{layer}.weight"
        arrays[key] = np.concatenate([arrays[key], arrays[key]])


def without_head(arrays):
    """As a backbone alone."""
    del arrays["fc.weight"], arrays["fc.bias"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            with_deep_stem,
            ["missing: conv1.weight", "unused: conv1.0.weight", "unused: conv1.1.weight"],
        ),
        (
            with_groups,
            ["mis-shaped: layer1.0.conv2.weight is (2, 1, 3, 3), and should be (2, 2, 3, 3)"],
        ),
        (
            twice_as_wide,
            [
                "mis-shaped: layer1.0.conv1.weight is (4, 2, 1, 1), and should be (2, 2, 1, 1)",
                "mis-shaped: layer1.0.conv2.weight is (4, 2, 3, 3), and should be (2, 2, 3, 3)",
            ],
        ),
        (without_head, ["missing: fc.bias", "missing: fc.weight"]),
    ],
)
def test_relatives_are_refused(change, found, tmp_path):
    arrays = arrays_of(BOTTLENECK, tmp_path)
    change(arrays)
    assert faults(refusal(arrays, tmp_path)) == found


@pytest.mark.parametrize(
    ("keys", "has"),
    [
        (["conv1.weight"], "has no basic blocks a stage"),
        (
            [f"layer{i}.{j}.conv3.weight" for i in (1, 2, 3, 4) for j in (0, 1)],
            r"\(2, 2, 2, 2\) bott",
        ),
        (
            [f"layer{i}.0.conv1.weight" for i in (1, 2)] + ["layer3.1.bn1.weight"],
            r"\(1, 1, 2\) basic",
        ),
    ],
)
def test_other_architectures_are_refused(keys, has, tmp_path):
    message = refusal({key: np.zeros(1, np.float32) for key in keys}, tmp_path)
    assert re.search(has, message)
    assert "resnet152" in message


@pytest.mark.parametrize(
    "says",
    [
        {"architecture": "resnetaa50"},
        {"architecture": "resnet50", "model_args": {"aa_layer": "avg"}},
        {"model_type": "resnet", "downsample_in_bottleneck": True},
        {"model_type": "resnet", "downsample_in_first_stage": True},
        {"model_type": "resnet", "hidden_act": "gelu"},
    ],
)
def test_another_network_with_the_same_keys_is_refused_by_its_description(says, tmp_path):
    path = saved(arrays_of(BOTTLENECK, tmp_path), tmp_path / "model", "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(says))
    with pytest.raises(ValueError, match="says") as error:
        pretrained.load(str(tmp_path / "model"))
    name, value = list(says.items())[-1]
    assert str({name: value}) in str(error.value)
    assert pretrained.load(path).config == BOTTLENECK


# --- paths and names ---


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    exported(CIFAR, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged.*save_file"):
        pretrained.load(str(path))


def test_a_description_that_is_no_json_is_refused(tmp_path):
    exported(CIFAR, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("architecture: resnet18")
    with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["nowhere.safetensors", "weights/resnet.safetensors", "./timm/resnet", "a/b/c", "resnet18"],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file or folder {name!r}")):
        pretrained.load(name)


def test_shards_are_joined_by_their_index(tmp_path):
    arrays = arrays_of(CIFAR, tmp_path / ".." / tmp_path.name)
    (tmp_path / "exported.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    of_shard = [dict([*arrays.items()][i::2]) for i in (0, 1)]
    for name, part in zip(shards, of_shard, strict=True):
        saved(part, tmp_path, name)
    index = {name: shard for shard, part in zip(shards, of_shard, strict=True) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for place in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_equal(pretrained.load(str(place)).network, some_network(CIFAR))
    with pytest.raises(ValueError, match="one of several shards: give the folder"):
        pretrained.load(str(tmp_path / shards[0]))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"index\.json lists {shards[1]}, which is not there"
    ):
        pretrained.load(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of shards"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", r"It has pytorch_model\.bin: convert it with safetensors\.torch"),
        ("best.pth", r"It has best\.pth: convert it"),
        ("other.safetensors", r"It has other\.safetensors: give the path of that file"),
    ],
)
def test_a_folder_with_other_weights_says_what_to_do(name, advice, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"no model\.safetensors in .* {advice}"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    "says",
    [
        {"pretrained_cfg": None},
        {"pretrained_cfg": [1]},
        {"input_size": 224},
        {"id2label": ["a"]},
        {"id2label": {"x": "a"}},
    ],
)
def test_a_description_of_another_form_is_refused(says, tmp_path):
    exported(CIFAR, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(says))
    with pytest.raises(ValueError, match=r"config\.json beside .* has not the form"):
        pretrained.load(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        pretrained.load(str(tmp_path))


def test_a_name_is_fetched_from_the_hub_with_what_describes_it(tmp_path, monkeypatch):
    exported(BASIC, tmp_path / "model.safetensors")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    describes = {"mean": mean, "std": std, "input_size": [3, 224, 224]}
    description = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": describes}
    (tmp_path / "config.json").write_text(json.dumps(description))
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = pretrained.load("timm/resnet18.a1_in1k", revision="v1")
    assert asked == [("timm/resnet18.a1_in1k", "v1", ["config.json", "model.safetensors"])]
    assert_equal(source.network, some_network(BASIC))
    metadata = {"architecture": "resnet18", "n_classes": "3", "image_size": "224"}
    assert source.metadata == metadata | {"mean": json.dumps(mean), "std": json.dumps(std)}


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("offline"),
        huggingface_hub.errors.EntryNotFoundError("no such file"),
        ConnectionError("no route"),
    ],
)
def test_a_hub_that_does_not_answer_is_told_with_the_way_out(error, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError, match=r"'timm/no'.*\(revision: main2\).*path of that"
    ) as told:
        pretrained.load("timm/no", revision="main2")
    assert told.value.__cause__ is error


def test_what_exists_as_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    folder = Path("timm/resnet18")
    folder.mkdir(parents=True)
    exported(BASIC, folder / "model.safetensors")
    assert pretrained.load("timm/resnet18").config == BASIC
    with pytest.raises(ValueError, match="revision='main' is for a name"):
        pretrained.load("timm/resnet18", revision="main")


# --- a new head ---


def test_a_new_head_is_all_that_is_new(tmp_path):
    exported(CIFAR, tmp_path / "a.safetensors")
    source = pretrained.load(str(tmp_path / "a.safetensors"))
    config, network = pretrained.with_new_head(source, n_classes=9, seed=1)
    assert config == dataclasses.replace(CIFAR, n_classes=9)
    assert jax.tree.map(jnp.shape, network.params["head"]) == {"kernel": (64, 9), "bias": (9,)}
    assert_equal(
        network._replace(params=network.params | {"head": None}),
        source.network._replace(params=source.network.params | {"head": None}),
    )
    _, again = pretrained.with_new_head(source, n_classes=9, seed=1)
    _, other = pretrained.with_new_head(source, n_classes=9, seed=2)
    assert_equal(again, network)
    assert not np.array_equal(other.params["head"]["bias"], network.params["head"]["bias"])


def test_real_weights_are_loaded_to_the_last_key():
    path = Path(os.environ.get("DTNH_DATA", "")) / "weights" / "cifar10_resnet20.safetensors"
    if "DTNH_DATA" not in os.environ or not path.is_file():
        pytest.skip("DTNH_DATA names no folder with weights/cifar10_resnet20.safetensors")
    source = pretrained.load(str(path))
    assert source.config == ResNetConfig("cifar_resnet20", 10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(source.network))
