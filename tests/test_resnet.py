# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import make_torch_fixtures as pytorch

for _package in ("flax", "safetensors", "huggingface_hub"):
    pytest.importorskip(_package)

import safetensors.numpy
from flax import traverse_util

import dtnh_jax
from examples.common import pretrained, resnet
from examples.common.resnet import Network, ResNetConfig

TINY = ResNetConfig("cifar_resnet8", 3, width=4)
TINY_IMAGENET = ResNetConfig("resnet18", 3, width=2)
SHAPE = (8, 9, 7, 3)


def images(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def trained_a_little(config, seed=0):
    """A network whose running averages and scales are not those of the start."""
    draws = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return draws.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        return (path[-1].key in ("scale", "var")) + draws.uniform(0, 0.5, leaf.shape)

    shapes = jax.eval_shape(lambda: resnet.init(config, 0))
    return jax.tree_util.tree_map_with_path(lambda *leaf: jnp.asarray(draw(*leaf), "f"), shapes)


apply = jax.jit(resnet.apply, static_argnums=0, static_argnames="train")


@pytest.fixture(scope="module", params=["cifar_resnet20", "resnet18", "resnet50"])
def from_pytorch(request, tmp_path_factory):
    facts, state = pytorch.stored(request.param)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    safetensors.numpy.save_file(state, path)
    inputs = jnp.asarray(pytorch.images(request.param).transpose(0, 2, 3, 1))
    return facts, pretrained.load(str(path)), inputs


def assert_same_fingerprints(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, (size, projection) in theirs.items():
        np.testing.assert_allclose(ours[name], (size, projection), atol=tolerance * size)


def of_features(output):
    """Fingerprints of the features as PyTorch has them."""
    features = dict(output.features)
    features["avgpool"] = features.pop("pooled")[:, None, None]
    return {
        name: pytorch.fingerprint(name, np.asarray(feature).transpose(0, 3, 1, 2))
        for name, feature in features.items()
    }


def largest_error(ours, theirs):
    """The largest error of logits, relative to the largest of them."""
    return np.max(np.abs(ours - np.asarray(theirs))) / np.max(np.abs(theirs))


def largest_error_of_fingerprints(ours, theirs):
    """The largest error of fingerprints, each relative to the size of its array."""
    assert ours.keys() == theirs.keys()
    return max(np.max(np.abs(np.subtract(ours[k], theirs[k]))) / theirs[k][0] for k in theirs)


def neighbours(inputs, n=3):
    """The images up or down by one float32 each: what they may have been before rounding."""
    for seed in range(n):
        up = np.random.default_rng(seed).random(inputs.shape) < 0.5
        yield jnp.nextafter(inputs, jnp.where(up, jnp.inf, -jnp.inf).astype(inputs.dtype))


def test_logits_and_features_are_those_of_pytorch(from_pytorch):
    facts, source, inputs = from_pytorch
    output = apply(source.config, source.network, inputs, train=False)
    assert largest_error(output.logits, facts["eval_logits"]) < 1e-5
    assert_same_fingerprints(of_features(output), facts["features"], tolerance=1e-5)


def test_logits_and_averages_in_training_are_those_of_pytorch(from_pytorch):
    facts, source, inputs = from_pytorch

    def run(inputs):
        output = apply(source.config, source.network, inputs, train=True)
        averages = torch_fingerprints(Network({}, output.batch_stats), source.config)
        return np.asarray(output.logits), averages

    logits, averages = run(inputs)
    of_logits, of_averages = 2e-5, 1e-5
    if source.config.architecture == "resnet50":
        # Batch norm over few values enlarges rounding errors a hundredfold: the error may be a few
        # times what the last bit of the images makes. The test in float64 sees smaller ones.
        others = [run(each) for each in neighbours(inputs)]
        of_logits = 6 * np.mean([largest_error(each, logits) for each, _ in others])
        of_averages = 6 * np.mean(
            [largest_error_of_fingerprints(each, averages) for _, each in others]
        )
        assert of_logits < 5e-4
        assert of_averages < 1e-4
    assert largest_error(logits, facts["train_logits"]) < of_logits
    assert largest_error_of_fingerprints(averages, facts["statistics"]) < of_averages


class InFloat64(ResNetConfig):
    def __post_init__(self):
        """Takes a dtype that the network is not made for."""


class NumPyInFloat64:
    """`jax.numpy` for a module that asks for float32 by name."""

    float32 = jnp.float64

    def __getattr__(self, name):
        return getattr(jnp, name)


def test_in_float64_all_digits_are_those_of_pytorch(from_pytorch, x64, monkeypatch):
    # PyTorch computed in float64, so that nothing but another formula makes a difference.
    monkeypatch.setattr(resnet, "jnp", NumPyInFloat64())
    facts, source, inputs = from_pytorch
    config = InFloat64(**dataclasses.asdict(source.config) | {"dtype": "float64"})
    network, inputs = jax.tree.map(lambda x: x.astype(jnp.float64), (source.network, inputs))
    of_eval, of_train = (apply(config, network, inputs, train=train) for train in (False, True))
    assert of_train.logits.dtype == jnp.float64
    assert largest_error(of_eval.logits, facts["eval_logits"]) < 1e-10
    assert largest_error(of_train.logits, facts["train_logits"]) < 1e-10
    # Nine digits of these are stored.
    assert_same_fingerprints(of_features(of_eval), facts["features"], tolerance=1e-8)
    averages = torch_fingerprints(Network({}, of_train.batch_stats), config)
    assert_same_fingerprints(averages, facts["statistics"], tolerance=1e-8)


@pytest.mark.parametrize("from_pytorch", ["cifar_resnet20", "resnet18"], indirect=True)
def test_gradients_are_those_of_pytorch_in_the_pair_too(from_pytorch):
    facts, source, inputs = from_pytorch
    config, (params, batch_stats), _ = source
    labels = jnp.asarray(pytorch.labels(config.architecture))

    @jax.jit
    @dtnh_jax.value_and_gradient_pair
    def objective(params):
        output = resnet.apply(config, Network(params, batch_stats), inputs, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, labels)
        return losses.mean(), jnp.mean(output.features["layer1"] ** 2)

    _, pair = objective(params)
    gradients = torch_fingerprints(Network(pair.loss_grads, {}), config)
    # A ReLU may flip whose input is zero but for the last bit; what is wrong is wrong by more.
    assert_same_fingerprints(gradients, facts["gradients"], tolerance=1e-2)
    assert pair.reg_grads["layer2"]["0"]["conv1"]["kernel"] is None
    assert np.any(pair.reg_grads["conv1"]["kernel"])


def torch_fingerprints(network, config):
    """Of the arrays as an export writes them."""
    return {
        (key := pretrained._torchvision_key(path, config)): pytorch.fingerprint(
            key, pretrained._transposed(np.asarray(leaf), pretrained._TO_TORCH)
        )
        for path, leaf in pretrained._leaves(network).items()
    }


@pytest.mark.parametrize(
    ("architecture", "n_classes", "n_params"),
    [
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("resnet101", 1000, 44_549_160),
        ("resnet152", 1000, 60_192_808),
        ("cifar_resnet20", 10, 269_722),
        ("cifar_resnet110", 10, 1_727_962),
    ],
)
def test_numbers_of_parameters_are_the_published_ones(architecture, n_classes, n_params):
    config = ResNetConfig(architecture, n_classes)
    network = jax.eval_shape(lambda: resnet.init(config, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(network.params)) == n_params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(network))


CONFIGS = [TINY, TINY_IMAGENET, ResNetConfig("resnet50", 3, width=2)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_layers_are_the_groups_of_the_rules_from_image_to_logits(config):
    network = jax.eval_shape(lambda: resnet.init(config, 0))
    rule = dtnh_jax.weighted_sum(1.0, scope="layer")

    def stats(params):
        _, state = rule.update(dtnh_jax.GradientPair(params, params), rule.init(params))
        return dtnh_jax.conflict_stats(state)

    names = resnet.layer_names(config)
    assert sorted(names) == sorted(jax.eval_shape(stats, network.params).groups)
    assert (names[0], names[1], names[-1]) == ("conv1", "bn1", "head")
    assert (
        names.index("layer2/0/conv1") < names.index("layer2/0/conv2") < names.index("layer3/0/bn1")
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_features_come_in_the_order_of_their_names(config):
    names = []

    def run(network, images):
        output = resnet.apply(config, network, images, train=False)
        names.extend(output.features)
        return output.logits

    jax.eval_shape(run, jax.eval_shape(lambda: resnet.init(config, 0)), images())
    assert tuple(names) == resnet.feature_names(config)
    assert set(resnet.layer_names(config)) - set(names) == {"head"}
    assert {"layer1/0", "layer1", "pooled"} < set(names)


def test_all_keys_are_strings():
    for tree in jax.eval_shape(lambda: resnet.init(TINY, 0)):
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            assert all(isinstance(entry.key, str) for entry in path)


def test_a_batch_on_eight_devices_has_the_statistics_of_all_of_it():
    network, batch = trained_a_little(TINY), images()
    # Image by image something else, so that statistics of a part would show.
    batch *= np.arange(1, 9, dtype=np.float32)[:, None, None, None]
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    on_eight = apply(
        TINY, jax.device_put(network, everywhere), jax.device_put(batch, spread), train=True
    )
    on_one = apply(TINY, network, batch, train=True)
    assert len(on_eight.logits.sharding.device_set) == 8
    np.testing.assert_allclose(on_eight.logits, on_one.logits, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        on_eight.batch_stats,
        on_one.batch_stats,
    )


def test_frozen_batch_norm_trains_on_its_averages_and_keeps_them():
    network, frozen = trained_a_little(TINY), dataclasses.replace(TINY, frozen_batch_norm=True)
    in_training = apply(frozen, network, images(), train=True)
    in_evaluation = apply(TINY, network, images(), train=False)
    np.testing.assert_array_equal(in_training.logits, in_evaluation.logits)
    for output in (in_training, in_evaluation):
        jax.tree.map(np.testing.assert_array_equal, output.batch_stats, network.batch_stats)
    model = resnet.build(frozen, network)
    model.train()
    np.testing.assert_allclose(model(jnp.asarray(images())), in_training.logits, atol=1e-5)
    unfrozen = apply(TINY, network, images(), train=True)
    assert np.abs(unfrozen.logits - in_training.logits).max() > 0.1


def test_the_statistics_of_a_large_mean_are_exact():
    # In float32 the difference of E[x²] and E[x]² has no correct digit here.
    norm = resnet.BatchNorm(1, frozen=False)
    x = 1e4 + images((8, 4, 4, 1))
    y = norm(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * exact.var(ddof=1), rtol=1e-4)
    np.testing.assert_allclose(y, (exact - exact.mean()) / exact.std(), atol=2e-3)


def test_one_value_a_channel_is_refused_in_training():
    network, one = trained_a_little(TINY), images((1, 4, 4, 3))
    with pytest.raises(ValueError, match="two values per channel"):
        resnet.apply(TINY, network, one, train=True)
    assert np.isfinite(apply(TINY, network, one, train=False).logits).all()


def test_bfloat16_is_for_activations_alone():
    network, batch = trained_a_little(TINY), images()

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def gradients(config, params):
        output = resnet.apply(config, Network(params, network.batch_stats), batch, train=True)
        return jnp.mean(output.logits**2), output

    exact, of_exact = gradients(TINY, network.params)
    rough, of_half = gradients(dataclasses.replace(TINY, dtype="bfloat16"), network.params)
    pooled = of_half.features.pop("pooled")
    float32 = (of_half.logits, pooled, of_half.batch_stats, rough)
    assert {leaf.dtype for leaf in jax.tree.leaves(float32)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in of_half.features.values()} == {jnp.dtype(jnp.bfloat16)}
    assert 0 < relative_error(of_half.logits, of_exact.logits) < 0.05
    assert 0 < relative_error(rough["head"]["kernel"], exact["head"]["kernel"]) < 0.05
    assert 0 < relative_error(rough["conv1"]["kernel"], exact["conv1"]["kernel"]) < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooling_takes_no_zero_from_beyond_the_border(dtype):
    x = -1 - jnp.arange(25, dtype=dtype).reshape(1, 5, 5, 1)
    pooled, gradient = jax.value_and_grad(lambda x: resnet._max_pool(x).sum())(x)
    first = np.array([0, 1, 3])  # the largest in a window is its first
    corners = x[:, first][:, :, first]
    np.testing.assert_array_equal(resnet._max_pool(x), corners)
    assert pooled == corners.sum()
    np.testing.assert_array_equal(gradient, jnp.isin(x, corners))


def relative_error(rough, exact):
    return np.linalg.norm(rough - exact) / np.linalg.norm(exact)


def test_many_networks_at_once_are_each_as_alone():
    networks = [trained_a_little(TINY, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    together = jax.jit(jax.vmap(lambda network: resnet.apply(TINY, network, images(), train=True)))(
        stacked
    )
    for i, network in enumerate(networks):
        alone = apply(TINY, network, images(), train=True)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            together,
            alone,
        )


def test_any_size_of_image_goes_through():
    network = trained_a_little(TINY_IMAGENET)
    for height, width in itertools.product((32, 33), (64, 47)):
        output = jax.eval_shape(
            lambda x: resnet.apply(TINY_IMAGENET, network, x, train=False),
            jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32),
        )
        halves = output.features["layer1"].shape[1:3]
        assert halves == (-(-height // 4), -(-width // 4))


def test_a_head_on_the_pooled_features_gives_the_logits():
    network, source = trained_a_little(TINY, 0), trained_a_little(TINY, 1)
    output = apply(TINY, network, images(), train=False)
    ours, theirs = (
        resnet.head_logits(of.params["head"], output.features["pooled"]) for of in (network, source)
    )
    np.testing.assert_allclose(ours, output.logits, atol=1e-6)
    mixed = Network(network.params | {"head": source.params["head"]}, network.batch_stats)
    np.testing.assert_allclose(theirs, apply(TINY, mixed, images(), train=False).logits, atol=1e-6)


def test_the_nnx_module_is_the_same_network():
    network, batch = trained_a_little(TINY), jnp.asarray(images())
    model = resnet.build(TINY, network)
    model.eval()
    of_eval, of_train = (apply(TINY, network, batch, train=train) for train in (False, True))
    np.testing.assert_allclose(model(batch), of_eval.logits, atol=1e-5)
    model.train()
    np.testing.assert_allclose(model(batch), of_train.logits, atol=1e-5)
    np.testing.assert_allclose(
        model.bn1.mean[...], of_train.batch_stats["bn1"]["mean"], rtol=1e-5, atol=1e-6
    )


DRAWN = ResNetConfig("cifar_resnet8", 100, width=32)


def test_initial_weights_are_drawn_as_torchvision_draws_them():
    params, batch_stats = resnet.init(DRAWN, 0)
    kernel = params["layer2"]["0"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    bound = 1 / np.sqrt(DRAWN.last_width)
    for leaf in params["head"].values():
        assert np.abs(leaf).max() <= bound
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    for path, leaf in traverse_util.flatten_dict(params | batch_stats).items():
        if path[-1] in ("scale", "var", "mean"):
            np.testing.assert_array_equal(leaf, 0 if path[-1] == "mean" else 1)


def test_a_seed_draws_one_network_every_layer_of_it_anew():
    first, again, other = (resnet.init(DRAWN, seed) for seed in (3, jax.random.key(3), 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.params["conv1"]["kernel"], other.params["conv1"]["kernel"])
    block = first.params["layer1"]["0"]
    assert not np.array_equal(block["conv1"]["kernel"], block["conv2"]["kernel"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "resnet20"}, "must be one of resnet18, .*'resnet20'"),
        ({"architecture": "cifar_resnet18"}, r"6n\+2.*'cifar_resnet18'"),
        ({"architecture": "cifar_resnet2"}, r"6n\+2.*'cifar_resnet2'"),
        ({"n_classes": 0}, "n_classes must be at least 1; got 0"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"dtype": "float16"}, "float32 or bfloat16; got 'float16'"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**{"architecture": "resnet18", "n_classes": 2} | fields)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((2, 9, 9, 1), "float32", ValueError, r"\(n, height, width, 3\); got \(2, 9, 9, 1\)"),
        ((9, 9, 3), "float32", ValueError, r"got \(9, 9, 3\)"),
        ((2, 9, 9, 3), "uint8", TypeError, "floating point.*got uint8"),
    ],
)
def test_wrong_images_are_refused(shape, dtype, error, message):
    with pytest.raises(error, match=message):
        resnet.apply(TINY, trained_a_little(TINY), jnp.zeros(shape, dtype), train=False)
