"""Compatibility of rules with Optax: the tables that the tests check and the docs show."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
import optax.contrib

Make = Callable[..., optax.GradientTransformation]

WORKS = "works"
JOINT = "both as one vector"
LOSS_ONLY = "loss gradient only"


class Refused(NamedTuple):
    """An error: who raises it, and a pattern of its message."""

    by: str
    match: str

    def __str__(self) -> str:
        return f"refused by {self.by}"


# Optax maps over the pair together with a state or params of another structure.
BY_OPTAX = Refused(
    "Optax", "structure|incompatible shapes|unexpected keyword|Expected (tuple|dict)"
)
BY_RULE = Refused("dtnh_jax", "dtnh_jax|reg_grads must have the structure")

Outcome = str | Refused


class Link(NamedTuple):
    """A transformation in the chain, before and after the rule.

    An elementwise transformation acts on the two gradients of a pair separately, so it works before
    the rule. After the rule every transformation works in both call styles, since it sees one tree.
    """

    name: str
    make: Make
    before_pair: Outcome
    before_reg_grads: Outcome = LOSS_ONLY


class Wrapper(NamedTuple):
    """A wrapper around a chain whose first link is the rule."""

    name: str
    make: Make
    pair: Outcome
    reg_grads: Outcome = WORKS
    note: str = ""


def _largest(tree: optax.Updates) -> jax.Array:
    return max(leaf.max() for leaf in jax.tree.leaves(tree))


def _mask(make: Make) -> Make:
    return lambda: optax.masked(make(), {"w": True, "v": False})


def _process(*parts: optax.GradientTransformation) -> optax.GradientTransformation:
    from optax.experimental import aggregating  # newer than the oldest Optax that is supported

    return aggregating.process(*parts)


LINKS = [
    Link("identity", optax.identity, WORKS, WORKS),
    Link("scale", lambda: optax.scale(2.0), WORKS),
    Link("scale_by_schedule", lambda: optax.scale_by_schedule(lambda t: 1 / (t + 1)), WORKS),
    Link("clip", lambda: optax.clip(2.0), WORKS),
    Link("clip_by_block_rms", lambda: optax.clip_by_block_rms(1.0), WORKS),
    Link("clip_by_global_norm", lambda: optax.clip_by_global_norm(1.0), JOINT),
    Link("contrib.normalize", lambda: optax.contrib.normalize(), JOINT),
    Link("adaptive_grad_clip", lambda: optax.adaptive_grad_clip(0.1), BY_OPTAX),
    Link("centralize", optax.centralize, WORKS),
    Link("zero_nans", optax.zero_nans, WORKS),
    Link("set_to_zero", optax.set_to_zero, WORKS),
    Link("monitor", lambda: optax.monitor({"largest": _largest}), WORKS, WORKS),
    Link("add_decayed_weights", lambda: optax.add_decayed_weights(0.1), BY_OPTAX),
    Link("ema", lambda: optax.ema(0.9), BY_OPTAX),
    Link("trace", lambda: optax.trace(0.9), BY_OPTAX),
    Link("scale_by_adam, adam, ...", optax.scale_by_adam, BY_OPTAX),
    Link("scale_by_trust_ratio", optax.scale_by_trust_ratio, BY_OPTAX),
    Link("lamb", lambda: optax.lamb(0.1), BY_OPTAX),
    Link("lars", lambda: optax.lars(0.1), BY_OPTAX),
    Link("contrib.muon", lambda: optax.contrib.muon(0.1), BY_OPTAX),
    Link("apply_every", lambda: optax.apply_every(2), BY_OPTAX),
    Link("keep_params_nonnegative", optax.keep_params_nonnegative, BY_OPTAX),
    Link("masked(trace)", _mask(lambda: optax.trace(0.9)), BY_OPTAX),
    Link("transforms.freeze", lambda: optax.transforms.freeze({"w": True, "v": False}), BY_OPTAX),
    Link("flatten(trace)", lambda: optax.flatten(optax.trace(0.9)), BY_OPTAX),
]

WRAPPERS = [
    Wrapper("chain", lambda tx: optax.chain(tx), WORKS),
    Wrapper("named_chain", lambda tx: optax.named_chain(("rule", tx)), WORKS),
    Wrapper(
        "inject_hyperparams",
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(1.0),
        WORKS,
    ),
    Wrapper("masked", lambda tx: optax.masked(tx, {"w": True, "v": True}), BY_OPTAX),
    Wrapper(
        "partition",
        lambda tx: optax.partition({"all": tx}, {"w": "all", "v": "all"}),
        BY_OPTAX,
        note="one rule per part: groups do not extend over parts",
    ),
    Wrapper("apply_if_finite", lambda tx: optax.apply_if_finite(tx, 2), BY_OPTAX),
    Wrapper(
        "conditionally_transform",
        lambda tx: optax.conditionally_transform(tx, lambda step: step < 5),
        BY_OPTAX,
    ),
    Wrapper(
        "conditionally_mask",
        lambda tx: optax.conditionally_mask(tx, lambda step: step < 5),
        BY_OPTAX,
    ),
    Wrapper(
        "experimental.aggregating.process",
        lambda tx: _process(optax.identity(), tx, optax.identity()),
        WORKS,
        BY_OPTAX,
        "as the aggregator, where a pair becomes one tree",
    ),
    Wrapper(
        "experimental.aggregating.process, postprocessor",
        lambda tx: _process(optax.identity(), optax.identity(), tx),
        BY_OPTAX,
        BY_OPTAX,
        "make the rule the aggregator",
    ),
    Wrapper(
        "MultiSteps",
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        BY_OPTAX,
        BY_RULE,
        "it would average only the loss gradients: use `accumulate_pairs`; it works around a link "
        "that makes the pair",
    ),
    Wrapper(
        "MultiSteps, skip_not_finite",
        lambda tx: optax.MultiSteps(
            tx, 1, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        BY_OPTAX,
        BY_RULE,
        "use `apply_if_finite`",
    ),
    Wrapper(
        "flatten",
        optax.flatten,
        BY_RULE,
        BY_RULE,
        "the rule needs the tree structure: flatten after the rule",
    ),
    Wrapper("lookahead", lambda tx: optax.lookahead(tx, 2, 0.5), WORKS, BY_RULE),
    Wrapper("contrib.schedule_free", lambda tx: optax.contrib.schedule_free(tx, 1.0), WORKS),
    Wrapper("contrib.mechanize", optax.contrib.mechanize, BY_OPTAX),
    Wrapper(
        "contrib.sam",
        lambda tx: optax.contrib.sam(tx, optax.sgd(0.1), sync_period=2),
        BY_OPTAX,
        BY_OPTAX,
        "compute the pair at the perturbed params yourself, and pass it to the rule",
    ),
    Wrapper(
        "contrib.split_real_and_imaginary",
        optax.contrib.split_real_and_imaginary,
        WORKS,
        BY_RULE,
    ),
]


def as_markdown() -> str:
    """Both lists as tables."""
    lines = [
        "| transform | before the rule: pair | before the rule: `reg_grads=` | after the rule |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{link.name}` | {link.before_pair} | {link.before_reg_grads} | {WORKS} |"
        for link in LINKS
    ]
    lines += ["", "| wrapper around the rule | pair | `reg_grads=` | note |", "|---|---|---|---|"]
    lines += [
        f"| `{each.name}` | {each.pair} | {each.reg_grads} | {each.note} |" for each in WRAPPERS
    ]
    return "\n".join(lines)
