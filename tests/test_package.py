"""The package as it is installed: what it imports, what it shows, and how its rooms lie."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import dtnh_jax

ROOT = pathlib.Path(dtnh_jax.__file__).parent
# Each room may import those before it, and none after it.
ROOMS = [
    "_tree",
    "_numerics",
    "_layout",
    "weightings",
    "_geometry",
    "_jax_internals",
    "_pair",
    "_gradients",
    "nnx",
    "equinox",
    "_reference",
    "_stats",
    "_combine",
    "_transform_pair",
    "_rules",
    "_rivals",
    "_optimizers",
    "regularizers._batch",
    "regularizers._weights",
    "regularizers._fisher",
    "regularizers._matching",
    "regularizers._outputs",
    "regularizers._features",
    "regularizers._inputs",
    "regularizers",
    "_decoupled",
    "_accumulation",
    "",
]


def public():
    names = [(name, getattr(dtnh_jax, name)) for name in dtnh_jax.__all__]
    names += [
        (f"{module}.{name}", getattr(getattr(dtnh_jax, module), name))
        for module in ("equinox", "nnx", "regularizers", "weightings")
        for name in getattr(dtnh_jax, module).__all__
    ]
    return [(name, value) for name, value in names if not inspect.ismodule(value)]


def test_import_is_light():
    """Importing the library brings jax and optax, and none of what the examples need."""
    script = (
        "import sys, jax, optax; before = set(sys.modules); import dtnh_jax;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    new = set(ast.literal_eval(done.stdout))
    assert not new & {
        "flax",
        "tensorflow",
        "tensorflow_datasets",
        "sklearn",
        "matplotlib",
        "equinox",
    }
    assert new <= {"dtnh_jax"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(("name", "value"), public())
def test_docstring_is_whole(name, value):
    doc = inspect.getdoc(value)
    assert doc
    assert "Examples:" in doc
    assert ">>>" in doc
    if inspect.isfunction(value):
        for section in ("Args:", "Returns:", "References:"):
            assert section in doc
        # A weighting is arithmetic, which raises nothing.
        assert "Raises:" in doc or name.startswith("weightings.")
    else:
        assert "Attributes:" in doc


def test_every_public_name_has_its_place_in_the_docs():
    page = ROOT.parent / "docs" / "api.md"
    if not page.exists():
        pytest.skip("the docs are not beside the installed package")
    listed = re.findall(r"^::: dtnh_jax\.([\w.]+)", page.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name, _ in public())


def test_arrows_go_down():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): path
        for path in ROOT.rglob("*.py")
    }
    assert sorted(modules) == sorted(ROOMS)
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "dtnh_jax"
            ):
                continue
            base = node.module.removeprefix("dtnh_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                target = inner if inner in modules else base
                assert ROOMS.index(target) < ROOMS.index(name), f"{name} imports {target}"


def test_the_table_of_modules_is_true():
    page = ROOT.parent / "CONTRIBUTING.md"
    if not page.exists():
        pytest.skip("CONTRIBUTING.md is not beside the installed package")
    cells = re.findall(r"^\| (`[^|]*) \|", page.read_text(), re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`([\w/]+?)(?:\.py|/)`", cell)]
    rooms = list(dict.fromkeys(room.partition(".")[0] for room in ROOMS if room))
    assert listed == rooms
