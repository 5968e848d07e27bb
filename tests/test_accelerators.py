"""Programs for accelerators, which are compiled here and not run.

What a program for a TPU may consist of is bounded, as that of one for a CPU is in
`test_program_size.py`. A failure says what was found. Where a change makes programs smaller,
tighten the bounds.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_trees_equal, random_tree

import dtnh_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

RIVALS = [
    name
    for name in dtnh_jax.__all__
    if getattr(getattr(dtnh_jax, name), "__module__", None) == dtnh_jax.bloop.__module__
]
RULES = {
    "weighted_sum": dtnh_jax.weighted_sum(0.1),
    "weighted_sum, diagnostics=False": dtnh_jax.weighted_sum(0.1, diagnostics=False),
    **{f"dtnh {s}": dtnh_jax.dtnh(0.1, scope=s) for s in ("global", "layer", "leaf", "element")},
    "dtnh layer, diagnostics=False": dtnh_jax.dtnh(0.1, scope="layer", diagnostics=False),
    "dtnh layer, reference=ema": dtnh_jax.dtnh(0.1, scope="layer", reference=optax.ema(0.9)),
    "bounded sum": dtnh_jax.dtnh(0.1, on_conflict="keep", max_ratio=1.0, scope="layer"),
    "dtnh_sgd": dtnh_jax.dtnh_sgd(0.1, 0.1),
    "dtnh_adamw": dtnh_jax.dtnh_adamw(0.1, 0.1),
    **{name: getattr(dtnh_jax, name)(0.1, scope="layer") for name in RIVALS},
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_exported_for_every_platform_and_is_the_same_there(name):
    a, b = (jax.tree.map(jnp.asarray, random_tree(seed)) for seed in range(2))
    tx = RULES[name]
    arguments = dtnh_jax.GradientPair(a, b), tx.init(a), a
    exported = jax.export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_trees_equal(exported.call(*arguments), jax.jit(tx.update)(*arguments))


class Bound(NamedTuple):
    """The most that a program for a TPU may have.

    Attributes:
        fusions: Kernels; of a step, beyond those of the weighted sum's.
        accessed: Bytes that are read and written, over those of the weighted sum.
        temporary: Bytes besides arguments and outputs; of a step, beyond those of the weighted sum.
    """

    fusions: int
    accessed: float
    temporary: int


N_LEAVES = 12
# Fusions: one for each leaf, and one more for its sums. Accesses: a little above what was found, in
# leaves that are mostly padding. Temporary: of the arrays that numbers are collected in.
COMBINATIONS = {
    "weighted_sum, diagnostics=False": Bound(N_LEAVES, 1, 0),
    "dtnh element, diagnostics=False": Bound(N_LEAVES, 1.01, 0),
    "dtnh layer, diagnostics=False": Bound(2 * N_LEAVES, 1.56, 0),
    "dtnh layer": Bound(2 * N_LEAVES + 2, 1.6, 1_700_000),
    "dtnh global, diagnostics=False": Bound(2 * N_LEAVES, 1.43, 2_100_000),
    "dtnh_sgd": Bound(2 * N_LEAVES + 2, 4, 3_600_000),
}
# One more fusion for each of 23 leaves, and one for the diagnostics.
STEPS = {"replicated": Bound(24, 1.12, 9_000_000), "sharded": Bound(24, 1.12, 9_000_000)}


@pytest.fixture(scope="module")
def tpu():
    """The module `accelerators`, and devices for which it compiles programs."""
    for package in ("flax", "rich", "tyro"):
        pytest.importorskip(package)
    from benchmarks import accelerators

    if reason := accelerators.missing("v5e:2x2"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in accelerators.ENVIRONMENT.items():
            patch.setenv(name, value)
        try:
            devices = accelerators.devices_of("v5e:2x2")
        except Exception as error:
            pytest.skip(f"libtpu cannot start: {error}")
        yield accelerators, devices


def measured(tpu, contestant, layout=None):
    """The cells of a small program."""
    from benchmarks.config import Config

    accelerators, devices = tpu
    sizes = Config(smoke=True).settled()
    sizes = dataclasses.replace(sizes, width=8)  # wide enough that some leaves are cut
    job = accelerators.Job(
        "v5e:2x2",
        f"small_{N_LEAVES}" if layout is None else "cifar_resnet8",
        contestant,
        None if layout is None else "l2_sp",
        layout,
        sizes,
    )
    return accelerators.measure(job.lowered(devices), *job.unit)


def over(found, bound):
    """What exceeds its bound."""
    return {
        name: f"{now:.5g} > {most}"
        for name, now, most in zip(Bound._fields, found, bound, strict=True)
        if now > most
    }


@pytest.fixture(scope="module")
def base_of_combinations(tpu):
    with jax.numpy_dtype_promotion("standard"):
        return measured(tpu, "weighted_sum, diagnostics=False")


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_for_a_tpu_is_no_larger_than_its_bound(name, tpu, base_of_combinations):
    cells = measured(tpu, name)
    found = Bound(
        cells["fusions"],
        cells["GB accessed"] / base_of_combinations["GB accessed"],
        round(1e9 * cells["temporary GB"]),
    )
    assert not over(found, COMBINATIONS[name])
    assert cells["collectives"] == ""


@pytest.mark.parametrize("layout", STEPS)
def test_a_rule_adds_no_message_to_a_step_on_tpus(layout, tpu):
    base, cells = (
        measured(tpu, name, layout)
        for name in ("weighted_sum, closed form", "dtnh layer, closed form")
    )
    found = Bound(
        cells["fusions"] - base["fusions"],
        cells["GB accessed"] / base["GB accessed"],
        round(1e9 * (cells["temporary GB"] - base["temporary GB"])),
    )
    assert not over(found, STEPS[layout])
    # The sums of sharded leaves go with a message that is sent anyway.
    assert cells["collectives"] == base["collectives"]
    assert cells["collective MB"] <= 1.001 * base["collective MB"]


def test_a_compiler_that_is_not_there_is_said(monkeypatch):
    for package in ("flax", "rich", "tyro"):
        pytest.importorskip(package)
    from benchmarks import accelerators
    from benchmarks.config import Config

    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    sizes = Config().settled()
    table = accelerators.run(sizes, None)
    assert table.rows == []
    for target, name in (("v5e:2x2", "libtpu"), ("h100", "jax_cuda12_plugin")):
        assert f"Nothing for {target}: {name} is not installed: pip install" in table.about
