# SPDX-License-Identifier: Apache-2.0
"""Heads as they are saved, without a card."""

from pathlib import Path

import pytest

from adadecode_vllm.heads import save_heads
from tests.published_heads import make_config, make_weights


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    save_heads(directory, make_weights(), make_config())
    return directory
