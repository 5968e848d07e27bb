"""Changes one line of the library at a time and runs the tests: `python -m benchmarks.mutants`.

A mutant that no test notices is printed as SURVIVED: write the test, or remove what nothing needs.
It works on a copy. A tool that mutates every operator would run for days, since most tests compile
programs; this list holds the lines that decide something, each with the test files of its room. Add
to it where a line turns out to be untested.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One change.

    Attributes:
        module: The file below ``dtnh_jax``, without its suffix.
        old: Text that the file has once.
        new: What takes its place.
        tests: The test files that should notice, without ``test_`` and suffix.
    """

    module: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("weightings", "geometry.along >= 0", "geometry.along > 0", "rules"),
    Mutant("weightings", "ref_norm > 0, cos, 1)", "ref_norm > 0, cos, 0)", "rules"),
    Mutant("weightings", " * jnp.sign(weights.ref) *", " *", "rules"),
    Mutant("weightings", "ref**2 + 2 * cos * ref * reg", "ref**2", "bounded"),
    Mutant("weightings", "cos = cos + 8 *", "cos = cos + 0 *", "not_finite"),
    Mutant(
        "weightings",
        "reg_norm > 0, kept * weights.reg, 0)",
        "reg_norm >= 0, kept * weights.reg, 0)",
        "not_finite",
    ),
    Mutant(
        "weightings", "is_lost & (weights.reg != 0), 0, kept", "is_lost, kept, kept", "not_finite"
    ),
    Mutant(
        "weightings", "jnp.isfinite(length), length, jnp.inf", "True, length, jnp.inf", "not_finite"
    ),
    Mutant(
        "weightings", "jnp.minimum(along, geometry.ref_norm)", "jnp.minimum(along, 1.0)", "rules"
    ),
    Mutant(
        "weightings", "along = geometry.ref_norm + reg_weight", "along = 1.0 + reg_weight", "rules"
    ),
    Mutant(
        "weightings",
        "held = jnp.where(reg_weight > 0,",
        "held = jnp.where(reg_weight >= 0,",
        "rules",
    ),
    Mutant("weightings", "distance), 0, 1), 0.5)", "distance), 0, 1), 0.0)", "rules"),
    Mutant(
        "weightings",
        "jnp.where(reg_weight > 0, ratio(half,",
        "jnp.where(reg_weight >= 0, ratio(half,",
        "rules",
    ),
    Mutant("weightings", "largest = jnp.maximum(a_norm, b_norm)", "largest = b_norm", "rules"),
    Mutant(
        "_geometry",
        "size * float(info.tiny)",
        "size * 0.0 * float(info.tiny)",
        "direction not_finite",
    ),
    # Arrays that no TPU needs, and a pass more: seen where libtpu is installed.
    Mutant("_geometry", "default=_added)", "default=_added_as_arrays)", "accelerators"),
    Mutant(
        "_geometry",
        "return total(scaled(r, ref, dtype), scaled(b, reg, dtype))",
        "return total(scaled(r, ref, dtype), jax.lax.optimization_barrier(scaled(b, reg, dtype)))",
        "accelerators",
    ),
    Mutant("_geometry", "size * float(info.tiny)", "float(info.tiny)", "direction"),
    Mutant(
        "_geometry",
        "jax.lax.optimization_barrier(jnp.stack(column))",
        "jnp.stack(column)",
        "program_size",
    ),
    Mutant(
        "_geometry", "if jnp.iscomplexobj(x) and jnp.iscomplexobj(y):", "if False:", "direction"
    ),
    Mutant("_geometry", ", 0) + 0 * squares", ", 0)", "not_finite"),
    Mutant("_geometry", "ref_sq + reg_sq + bound_sq", "ref_sq + reg_sq", "not_finite"),
    Mutant("_combine", "jnp.isnan(ref), 0, combine", "False, 0, combine", "not_finite"),
    Mutant(
        "_combine",
        "jnp.minimum(reg_weight, float(jnp.finfo(dtype).max))",
        "reg_weight",
        "not_finite",
    ),
    Mutant("_combine", "jnp.where(reg_weight == 0, jnp.nan, ref)", "ref", "not_finite"),
    Mutant(
        "_combine",
        "share = jnp.minimum(ratio(limit, length), 1)",
        "share = jnp.ones_like(limit)",
        "not_finite",
    ),
    Mutant("_combine", "jnp.isfinite(new), jnp.maximum", "True, jnp.maximum", "not_finite"),
    Mutant(
        "_combine", "jnp.asarray(optax.safe_increment(state.count))", "state.count + 1", "transform"
    ),
    Mutant("_combine", 'f"{k:0{width}}/{name}"', 'f"{k}/{name}"', "layout"),
    Mutant(
        "_combine",
        "dtype for dtype in dtypes if jnp.issubdtype",
        "dtype for dtype in [] if jnp.issubdtype",
        "stats",
    ),
    Mutant("_combine", "if layout.leaves else params", "if True else params", "transform"),
    Mutant(
        "_combine", "if jnp.iscomplexobj(b) and not jnp.iscomplexobj(a):", "if False:", "errors"
    ),
    Mutant("_combine", "if jnp.ndim(reg_weight) != 0 or not 0", "if not 0", "errors"),
    Mutant("_combine", "isinstance(max_ratio, bool) or not is_array", "not is_array", "bounded"),
    Mutant("_combine", "!= 0, part, 0)", ">= 0, part, 0)", "not_finite"),
    Mutant(
        "_stats",
        "x = jnp.clip(ratio(weights.ref, reg_weight * geometry.reg_norm), -limit, limit)",
        "x = ratio(weights.ref, reg_weight * geometry.reg_norm)",
        "rules",
    ),
    Mutant(
        "_stats",
        "_relative(each.ref_norm), _relative(each.reg_norm)",
        "each.ref_norm, each.reg_norm",
        "stats",
    ),
    Mutant("_stats", "jnp.minimum(share, _largest_share(share))", "share", "rules"),
    Mutant("_stats", "reached=finite & reached", "reached=finite", "stats"),
    Mutant(
        "_layout",
        "scope is None or isinstance(scope, bool | int | float)",
        "scope is None",
        "errors",
    ),
    Mutant(
        "_layout",
        "bool(entry) and not is_absent(leaf) for",
        "bool(entry) for",
        "direction transform",
    ),
    Mutant("_layout", "groups = sorted([", "groups = list([", "stats"),
    Mutant(
        "_layout",
        '("/".join(keys) or ".", keys) for',
        '("/".join(keys) or ".", ("/".join(keys),)) for',
        "layout",
    ),
    Mutant("_tree", "return callable(node) and is_leaf", "return callable(node)", "layout"),
    Mutant("_tree", "            used.update(above)\n", "", "transform"),
    Mutant("_tree", '            or hasattr(node, "unbox")\n', "", "transform"),
    Mutant(
        "_transform_pair",
        "reg_state, reached, **extra_args",
        "reg_state, None, **extra_args",
        "links",
    ),
    Mutant("_transform_pair", "None if b is None else x for", "x for", "bounded links"),
    Mutant("_transform_pair", "jnp.isfinite(now), now,", "True, now,", "not_finite"),
    Mutant("_transform_pair", "dtype.itemsize < 4", "False", "not_finite bounded"),
    Mutant(
        "_decoupled",
        "_at(learning_rate, state.rule.count)",
        "_at(learning_rate, state.rule.count + 1)",
        "decoupled",
    ),
    Mutant(
        "_decoupled",
        "jax.tree.map(jnp.conj, l2_sp_gradient(params, start, mask=mask))",
        "l2_sp_gradient(params, start, mask=mask)",
        "decoupled",
    ),
    Mutant(
        "_decoupled",
        "pair.loss_grads, state.optimizer, params, **extra_args",
        "pair.loss_grads, state.optimizer, params",
        "decoupled",
    ),
    Mutant("_accumulation", "isinstance(every_k, bool) or not", "not", "accumulation"),
    Mutant(
        "_accumulation",
        "jnp.asarray(grad).astype(dtype)",
        "jnp.asarray(grad)",
        "accumulation",
    ),
    Mutant(
        "_accumulation",
        "ratio(total, weight.astype(total.dtype)).astype(jnp.result_type(grad))",
        "ratio(total, weight.astype(total.dtype))",
        "accumulation",
    ),
    Mutant("_accumulation", "x.dtype, device=x.sharding)", "x.dtype)", "accumulation devices"),
    Mutant(
        "_accumulation",
        "inner.update(means, optimizer_state, params, **extra_args)",
        "inner.update(means, optimizer_state, params)",
        "accumulation",
    ),
    Mutant(
        "_accumulation",
        "if is_absent(total) or is_absent(grad) else",
        "if is_absent(total) else",
        "accumulation",
    ),
    Mutant(
        "_gradients", "-len(args) <= number < len(args)", "0 <= number < len(args)", "gradients"
    ),
    Mutant("_gradients", "leaf if is_reached else None", "leaf", "gradients"),
    Mutant("_pair", "if pair is None or is_params_like:", "if pair is None:", "errors"),
    Mutant(
        "_pair",
        "isinstance(updates, Mapping) and not isinstance(updates, dict)",
        "isinstance(updates, Mapping)",
        "errors",
    ),
    Mutant(
        "_pair",
        "for keys in ((0, 1), GradientPair._fields):",
        "for keys in ((0, 1),):",
        "frameworks",
    ),
    Mutant("_pair", "and not (reg_grads is None and pair is not None)", "", "errors"),
    Mutant("_reference", "            params = layout.only_reached(leaves)\n", "", "transform"),
    Mutant("_reference", "jnp.where(jnp.isfinite(m), m, 0)", "m", "not_finite"),
    Mutant(
        "_numerics",
        "size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))",
        "size = jnp.ones((len(x),) + (1,) * (x.ndim - 1), x.dtype)",
        "regularizers_features regularizers_inputs",
    ),
    Mutant("regularizers/_features", 'mode="r")', 'mode="r") ** 2', "regularizers_features"),
    Mutant(
        "regularizers/_outputs",
        "p * jnp.where(p > 0, log_p - log_q, 0)",
        "p * (log_p - log_q)",
        "regularizers_outputs",
    ),
    Mutant(
        "regularizers/_outputs",
        "p * jnp.where(p != 0, log_q, 0)",
        "p * log_q",
        "regularizers_outputs",
    ),
    Mutant(
        "regularizers/_outputs",
        "jnp.where(labels < 0, len(rows), labels.astype(jnp.int32))",
        "labels",
        "regularizers_outputs",
    ),
    Mutant(
        "regularizers/_fisher",
        "(label >= 0) & (label < classes)",
        "label < classes",
        "regularizers_outputs",
    ),
]


def survives(mutant: Mutant, copy: pathlib.Path, limit: float) -> bool:
    """Whether the tests pass on ``copy`` with this change, which is then taken back."""
    path = copy / "dtnh_jax" / f"{mutant.module}.py"
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new, 1))
    tests = [f"tests/test_{name}.py" for name in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # In one folder for all: most programs are those of the library as it is.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(copy / ".cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=copy, env=os.environ | cache, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(source)
    if done.returncode not in (0, 1):  # neither passed nor failed: pytest could not run them
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 0


def main() -> None:
    """Runs the mutants that are named by their numbers, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", type=int, nargs="*", help="which mutants; all if none is given")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each")
    arguments = parser.parse_args()
    n_survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "results", "site"))
        for number in arguments.numbers or range(len(MUTANTS)):
            mutant = MUTANTS[number]
            survived = survives(mutant, copy, arguments.limit)
            n_survived += survived
            change = f"{mutant.old.strip()!r} -> {mutant.new.strip()!r}"
            outcome = "SURVIVED" if survived else "killed"
            print(f"{number:3} {outcome:8} {mutant.module}: {change}", flush=True)
    sys.exit(f"{n_survived} survived." if n_survived else 0)


if __name__ == "__main__":
    main()
