"""What every test of the project runs under, and the runner of the code in README and docs."""

import importlib.util
import os

# Before JAX looks for devices: eight of them, so that sharding is real on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# The docstrings of these modules use the framework that they are for.
collect_ignore = [
    f"dtnh_jax/{module}.py"
    for module, package in (("nnx", "flax"), ("equinox", "equinox"))
    if importlib.util.find_spec(package) is None
]

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
).pytest()
