# ruff: noqa: E402 (the module under test wants the packages that are asked for first)
"""The calibrated loss of `examples.common`."""

import math

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

needs.examples()

from scipy.optimize import minimize_scalar

from examples.common.calibration import TEMPERATURES, calibrated_loss, is_lower, scaled_losses


def drawn(seed, n=40, n_classes=5, scale=1.0):
    """Logits that are right more often than not, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[labels]
    return (scale * logits).astype(np.float32), labels


def loss_at(temperature, logits, labels):
    """In float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(scaled).sum(axis=1))
    return np.mean(log_sums - scaled[np.arange(len(labels)), labels])


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_is_the_minimum_over_temperatures(scale):
    logits, labels = drawn(0, scale=scale)
    best = minimize_scalar(
        lambda log: loss_at(math.exp(log), logits, labels), bounds=(-2, 2), method="bounded"
    )
    assert calibrated_loss(logits, labels) == pytest.approx(best.fun, abs=3e-4)
    assert calibrated_loss(logits, labels) <= loss_at(1.0, logits, labels)


def test_the_losses_of_each_image():
    logits, labels = drawn(1)
    found = np.asarray(jax.jit(scaled_losses)(logits, labels))
    assert found.shape == (40, len(TEMPERATURES))
    for temperature, losses in zip(TEMPERATURES, found.T, strict=True):
        assert losses.mean() == pytest.approx(loss_at(temperature, logits, labels), rel=1e-5)


def test_confidence_makes_no_difference():
    logits, labels = drawn(2)
    wanted = float(calibrated_loss(logits, labels))
    for factor in (0.5, 0.8, 1.7, 2.0):
        assert calibrated_loss(factor * logits, labels) == pytest.approx(wanted, abs=3e-4)


def test_nan_is_kept():
    logits, labels = drawn(3)
    assert jnp.isnan(calibrated_loss(jnp.asarray(logits).at[0, 0].set(jnp.nan), labels))


def test_any_finite_loss_is_lower_than_one_that_is_not():
    assert is_lower(1.0, than=2.0)
    assert not is_lower(1.0, than=1.0)
    for bad in (math.nan, math.inf):
        assert is_lower(1e9, than=bad)
        assert not is_lower(bad, than=1.0)
        assert not is_lower(bad, than=bad)
