# SPDX-License-Identifier: Apache-2.0
"""What other packages raise, in a few words."""

from __future__ import annotations

import pytest

from adadecode_vllm.errors import first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such model.\nSee the manual."), "no such model"),
        (ValueError("\n  no such model  \n"), "no such model"),
        (ConnectionError(), "ConnectionError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_an_error_in_one_line(error: Exception, words: str) -> None:
    assert first_line(error) == words
