"""The mutants of tests/mutants.py fit the sources; make mutants runs them."""

import ast
import re

from tests import mutants


def test_no_mutant_is_stale():
    assert mutants.stale() == []


def test_each_names_a_test_that_is_there():
    for mutant in mutants.MUTANTS:
        path, _, name = mutant.tests.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (mutants.ROOT / path).read_text(), re.MULTILINE), mutant.tests


def test_each_is_a_program_still():
    for mutant in mutants.MUTANTS:
        source = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
        ast.parse(source.replace(mutant.old, mutant.new), mutant.new)
