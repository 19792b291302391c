# SPDX-License-Identifier: Apache-2.0
"""docs/features.md says what the tests show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.feature_matrix import (
    COLLECTED,
    DOCUMENT,
    ROOT,
    SECTIONS,
    Claim,
    collect,
    document,
)

EVERY = {
    Claim(name, "supported", "", "tests/a.py::test_it")
    for names in SECTIONS.values()
    for name in names
}


def test_the_document_is_what_the_tests_say(request: pytest.FixtureRequest) -> None:
    """`python -m tests.feature_matrix --write` makes it so."""
    asked = {Path(argument).resolve() for argument in request.config.args}
    # Collecting all tests takes half a minute; usually this run has done so.
    claims = request.config.stash[COLLECTED] if ROOT / "tests" in asked else collect()
    assert DOCUMENT.read_text(encoding="utf-8") == document(claims)


def test_a_row_for_every_status() -> None:
    gpu = Claim("seeds", "not applicable", "no seeds", "tests/b.py::T::test_x (GPU)")
    text = document(EVERY | {gpu})
    assert "| seeds | supported | [a.py](../tests/a.py): test_it |\n" in text
    assert (
        "| seeds | not applicable: no seeds | [b.py](../tests/b.py): T.test_x (GPU) |\n"
        in text
    )
    assert document(sorted(EVERY, key=lambda claim: claim.feature)) == document(EVERY)


def test_every_feature_needs_a_test() -> None:
    seeds = Claim("seeds", "supported", "", "tests/a.py::test_it")
    with pytest.raises(ValueError, match=r"no test is marked for: seeds$"):
        document(EVERY - {seeds})


@pytest.mark.parametrize(
    "claim",
    [
        Claim("no such thing", "supported", "", "tests/a.py::test_it"),
        Claim("seeds", "works", "", "tests/a.py::test_it"),
    ],
)
def test_markers_are_checked(claim: Claim) -> None:
    with pytest.raises(ValueError, match=r"tests/a\.py::test_it: unknown"):
        document(EVERY | {claim})
