"""The list of mutants is one of the library as it is."""

import pytest

from benchmarks.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.module}: {mutant.old}")
def test_the_text_is_there_once_and_so_are_the_tests(mutant):
    source = (ROOT / "dtnh_jax" / f"{mutant.module}.py").read_text()
    assert source.count(mutant.old) == 1
    compile(source.replace(mutant.old, mutant.new), mutant.module, "exec")
    for name in mutant.tests.split():
        assert (ROOT / "tests" / f"test_{name}.py").exists()
