# ruff: noqa: E402 (the modules under test want the packages that are asked for first)

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for _package in ("flax", "rich", "tyro"):
    pytest.importorskip(_package)

from benchmarks import combination, goals, hlo, report, timing, trees
from benchmarks.__main__ import main
from benchmarks.config import SECTIONS, Config
from benchmarks.goals import Goal
from benchmarks.hlo import Collectives
from benchmarks.programs import compile_program
from benchmarks.report import Table
from benchmarks.timing import Samples

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    with jax.numpy_dtype_promotion("standard"):
        main(Config(out=folder, smoke=True))
    return folder


def rows_of(out, name):
    return json.loads((out / f"{name}.json").read_text())["rows"]


def test_the_command_writes_a_page_and_two_files_for_each_table(out):
    names = [*SECTIONS, "goals"]
    assert {path.name for path in out.iterdir()} == {
        "benchmarks.md",
        *(f"{name}.{ending}" for name in names for ending in ("md", "json")),
    }
    page = (out / "benchmarks.md").read_text()
    for name in names:
        saved = json.loads((out / f"{name}.json").read_text())
        assert f"## {saved['title']}" in page
        assert {"device", "cores", "jax", "copy", "float32 matmul"} <= set(saved["header"])


@pytest.mark.parametrize("name", [*SECTIONS, "goals"])
def test_every_table_has_rows_of_finite_positive_numbers(out, name):
    rows = rows_of(out, name)
    assert rows or name in ("torch", "accelerators", "accelerator_steps")
    assert rows or "pip install" in (out / f"{name}.md").read_text()
    for row in rows:
        for column, cell in row.items():
            if isinstance(cell, float) and name != "goals":
                assert math.isfinite(cell), (column, row)
                # A floor out of differences of measured times may be anything in a loaded second.
                if column.endswith(" ms") and row.get("contestant") != "floor":
                    assert cell > 0, (column, row)


def test_every_contestant_has_its_row_and_the_base_is_one(out):
    rows = rows_of(out, "combination")
    assert [row["contestant"] for row in rows] == list(combination.contestants(all_rules=False))
    base = next(row for row in rows if row["contestant"] == combination.BASE)
    assert base["× weighted sum"] == 1


def test_what_devices_send_each_other(out):
    of_program = {row["program"]: row for row in rows_of(out, "scaling")}
    assert of_program[f"combination, {combination.BASE}"]["collectives"] == "none"
    assert of_program["combination, dtnh global"]["collectives"] == "1 all-reduce"
    # Both of distillation's gradients are summed over the devices, not one sum of them.
    one, both = (
        of_program[f"step, distillation, {name}"]["bytes"]
        for name in ("weighted sum, one gradient", "dtnh layer")
    )
    assert 1.5 * one < both < 2.5 * one


def test_every_contestant_computes_a_direction_of_its_pair():
    """That none is fast because it does something else: without conflict all sums are alike."""
    shapes = trees.tree("small_6")
    a = trees.random_like(shapes, 0)
    inputs = combination.Inputs(a, a, a, jax.tree.map(jnp.zeros_like, a))
    expected = jax.tree.map(lambda leaf: (1 + combination.REG_WEIGHT) * leaf, a)
    known = combination.contestants(all_rules=False)
    sums = [name for name in known if "bloop" not in name]
    assert len(sums) > 8
    for name in sums:
        result = jax.jit(known[name].function)(*known[name].arguments(inputs))
        direction = result[0] if isinstance(result, tuple) else result
        for got, wanted in zip(jax.tree.leaves(direction), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_the_rule_by_hand_is_the_rule(scope):
    shapes = trees.tree("small_6")
    inputs = combination.Inputs(*(trees.random_like(shapes, seed) for seed in range(4)))
    known = combination.contestants(all_rules=False)
    by_hand, ours = (known[f"dtnh {scope}{suffix}"] for suffix in (" by hand", ""))
    direction, _ = ours.function(*ours.arguments(inputs))
    for got, wanted in zip(
        jax.tree.leaves(by_hand.function(*by_hand.arguments(inputs))),
        jax.tree.leaves(direction),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "n_leaves", "n_numbers"),
    [
        ("resnet18", 62, 11_689_512),  # those of torchvision and timm
        ("resnet50", 161, 25_557_032),
        ("vit_b", 152, 86_567_656),
        ("vit_l", 296, 304_326_632),
        ("300M", 12, 300_000_000),
        ("small_7", 7, 4 * 32 * 32 + 3 * 32),
    ],
)
def test_trees_are_those_of_the_networks(name, n_leaves, n_numbers):
    tree = trees.tree(name)
    assert len(jax.tree.leaves(tree)) == n_leaves
    assert trees.n_bytes(tree) == 4 * n_numbers


def test_an_unknown_tree_is_refused():
    with pytest.raises(ValueError, match=r"vit_b.*got 'vit_x'"):
        trees.tree("vit_x")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive; got 0"),
        ({"repetitions": 0}, "repetitions must be positive; got 0"),
        ({"leaves": ()}, r"leaves must be positive numbers; got \(\)"),
        ({"trees": ("vit_x",)}, "vit_b, .*got 'vit_x'"),
        ({"architectures": ("resnet19",)}, "architecture must be one of .*got 'resnet19'"),
        ({"devices": (0, 2)}, r"devices must be positive numbers; got \(0, 2\)"),
    ],
)
def test_choices_out_of_range_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        Config(**choice)


class FakeClock:
    """Moves when a contestant runs, by what it takes then."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def contestant(self, name, seconds):
        def call():
            self.order.append(name)
            self.now += seconds(len(self.order))

        return call


def test_contestants_are_timed_in_turn_and_drifts_cancel():
    clock = FakeClock()
    # The machine slows down with every call.
    contestants = {
        "one": clock.contestant("one", lambda n: float(n)),
        "two": clock.contestant("two", lambda n: 2.0 * n),
        "three": clock.contestant("three", lambda n: 3.0 * n),
    }
    samples = timing.compare(contestants, seconds=1e9, repetitions=60, clock=clock)
    assert {name: len(of_name.seconds) for name, of_name in samples.items()} == dict.fromkeys(
        contestants, 60
    )
    assert samples["one"].over(samples["one"]) == 1
    assert samples["two"].over(samples["one"]) == pytest.approx(2, rel=0.03)
    assert samples["three"].over(samples["one"]) == pytest.approx(3, rel=0.03)
    rounds = [clock.order[6 + 3 * i : 9 + 3 * i] for i in range(60)]
    assert all(sorted(each) == sorted(contestants) for each in rounds)
    assert len({each[0] for each in rounds}) == 3


def test_timing_stops_in_time_but_not_before_the_fewest():
    clock = FakeClock()
    contestants = {"slow": clock.contestant("slow", lambda n: 10.0)}
    assert (
        len(timing.compare(contestants, seconds=1, repetitions=9, clock=clock)["slow"].seconds) == 3
    )
    samples = timing.compare(contestants, seconds=45, repetitions=9, clock=clock)["slow"]
    assert samples.seconds.tolist() == [10.0] * 5


def test_spread_and_ratio_of_samples():
    samples, base = (
        Samples(np.array([1.0, 2.0, 3.0, 10.0])),
        Samples(np.array([1.0, 1.0, 1.0, 5.0])),
    )
    assert samples.cells() == {
        "median ms": 2500,
        "min ms": 1000,
        "quartile 1 ms": 1750,
        "quartile 3 ms": 4750,
    }
    assert samples.over(base) == 2  # the median of 1, 2, 3, 2


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %c = f32[] constant(2)
  %b = f32[8]{0} broadcast(%c), dimensions={}
  ROOT %m = f32[8]{0} multiply(%p, %b)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%rare (t: (f32[8])) -> f32[8] {
  %t = (f32[8]{0}) parameter(0)
  %g = f32[8]{0} get-tuple-element(%t), index=0
  ROOT %far = f32[8]{0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add
}

%usual (u: (f32[8])) -> f32[8] {
  %u = (f32[8]{0}) parameter(0)
  ROOT %h = f32[8]{0} get-tuple-element(%u), index=0
}

%body (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  ROOT %permuted = f32[8]{0} collective-permute(%w), source_target_pairs={{0,1}}
}

ENTRY %main.1 (a: f32[8], i: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="all-gather(all-reduce(x))"}
  %i = pred[] parameter(1)
  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  %r = (f32[3]{0}, /*index=1*/bf16[2,5]{1,0}) all-reduce(%f, %f), to_apply=%add
  %ags = (f32[8]{0}, f32[16]{0}) all-gather-start(%f), dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ags)
  %k = f32[8]{0} call(%f), to_apply=%body
  %tup = (f32[8]{0}) tuple(%k)
  ROOT %cond = f32[8]{0} conditional(%i, %tup, %tup), branch_computations={%rare, %usual}
}
"""


def test_a_program_is_read_from_its_text():
    module = hlo.parse(PROGRAM)
    assert module.entry == "main.1"
    assert module.count("fusion") == 1
    assert module.count("multiply") == 1
    assert module.size() == 11
    # fusion, all-reduce, all-gather-start and -done, call, collective-permute, conditional.
    assert module.launches() == 7


def test_collectives_are_counted_and_weighed_and_those_of_branches_apart():
    usual, rare = hlo.parse(PROGRAM).collectives()
    assert usual == Collectives(
        {"all-reduce": 1, "all-gather": 1, "collective-permute": 1},
        (3 * 4 + 10 * 2) + 16 * 4 + 8 * 4,
    )
    assert rare == Collectives({"all-reduce": 1}, 8 * 4)


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="must have an ENTRY; got 'HloModule'"):
        hlo.parse("HloModule")


def test_a_compiled_program_is_read_as_it_is():
    mesh = jax.make_mesh((8,), ("x",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=cut)
    program = compile_program(lambda x: (jnp.sum(x), 2 * x), x)
    usual, rare = program.hlo.collectives()
    assert usual == Collectives({"all-reduce": 1}, 4)
    assert rare == Collectives({}, 0)
    part = 8 * 16 * 4
    memory = program.memory(part)
    assert memory["arguments"] == 1
    assert memory["outputs"] == pytest.approx(1, abs=0.1)
    assert memory["donated"] == 0


def test_goals_are_met_or_not_or_not_measured():
    at_most, at_least = Goal("", None, 1.5), Goal("", None, 1.5, at_least=True)
    assert [goals.verdict(figure, at_most) for figure in (1.5, 1.6, None)] == [
        "met",
        "not met",
        "not measured here",
    ]
    assert [goals.verdict(figure, at_least) for figure in (1.5, 1.4)] == ["met", "not met"]


def test_a_goal_finds_its_figure():
    rows = [
        {"tree": "resnet50", "contestant": f"dtnh {scope}", "× weighted sum": ratio}
        for scope, ratio in (("layer", 1.4), ("global", 1.9))
    ]
    table = goals.run({"combination": Table("combination", "", "", rows)}, FAKE_CEILINGS)
    verdicts = {row["goal"]: (row["figure"], row[""]) for row in table.rows}
    layer, global_ = (
        f"combination, ResNet-50, dtnh {scope}: × weighted_sum" for scope in ("layer", "global")
    )
    assert verdicts.pop(layer) == (1.4, "met")
    assert verdicts.pop(global_) == (1.9, "not met")
    assert set(verdicts.values()) == {(None, "not measured here")}


FAKE_CEILINGS = goals.Ceilings(copy=1e9, triad=1e9, read=1e9, matmul={})


def test_cells_are_written_with_three_digits_that_count():
    cells = [None, "x", 3, 0.012345, 1.5, 12345.6, float("nan"), 0.0, True]
    assert [report.text(cell) for cell in cells] == [
        "", "x", "3", "0.0123", "1.5", "12346", "nan", "0", "True",
    ]  # fmt: skip


def test_a_table_as_markdown():
    table = Table("t", "Title", "About.", [{"a": 1, "b": 2.0}, {"a": 3, "c": "x"}])
    assert report.as_markdown(table).splitlines() == [
        "## Title",
        "",
        "About.",
        "",
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 2 |  |",
        "| 3 |  | x |",
    ]
