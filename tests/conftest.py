"""Strict air for the tests of the library: no silent promotion, float64 only where asked."""

import jax
import pytest

# Scripts of tests that have no examples, and want packages that not every test has.
collect_ignore = ["tiny_finetune.py", "soak_finetune.py", "fixtures"]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """What users of Optax's Adam and averages have, which promote silently."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
