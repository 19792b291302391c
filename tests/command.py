# SPDX-License-Identifier: Apache-2.0
"""The `adadecode` command, run within the tests' process."""

from __future__ import annotations

import pytest

from adadecode_vllm.cli import main


def run(*argv: object) -> int:
    """Run the command and return its exit status."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code
