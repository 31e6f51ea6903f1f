"""Which tests `make quick` runs."""

from __future__ import annotations

from changed import ALWAYS, files_for


def test_a_module_brings_the_tests_that_mention_it_or_its_public_names() -> None:
    found = files_for(["lowbit/elastic/slim.py", "tests/test_cli.py", "kernels/lowbit_kernels/packing.py", "LICENSE"])
    assert {"tests/test_slim.py", "tests/test_cli.py", "tests/kernels/test_packing.py", *ALWAYS} <= set(found)
    assert "tests/test_squad.py" not in found


def test_nothing_changed_brings_those_of_the_house() -> None:
    assert files_for([]) == sorted(ALWAYS)
