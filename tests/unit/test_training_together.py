# SPDX-License-Identifier: Apache-2.0
"""Processes that train together part in order."""

from __future__ import annotations

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.training.together import leaving_together


class _Connected:
    def __init__(self) -> None:
        self.ended = 0

    def end_training(self) -> None:
        self.ended += 1


def test_connections_end_with_the_run() -> None:
    connected = _Connected()
    with leaving_together(connected) as processes:
        assert processes is connected
        assert connected.ended == 0
    assert connected.ended == 1


def test_connections_end_with_a_failure() -> None:
    connected = _Connected()
    with pytest.raises(AdaDecodeError), leaving_together(connected):
        raise AdaDecodeError("--data: nothing is there")
    assert connected.ended == 1
