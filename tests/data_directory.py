# SPDX-License-Identifier: Apache-2.0
"""Data directories for tests, as `adadecode data` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adadecode_vllm.data.info import DatasetInfo
from adadecode_vllm.data.shards import DataRow, ShardWriter


def write_rows(
    directory: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab_size: int,
    model: str = "tiny",
    rows_per_shard: int = 64,
) -> Path:
    """Write prompts and answers, token ids both.

    Returns:
        The directory.
    """
    info = DatasetInfo(
        model=model,
        vocab_size=vocab_size,
        rows=len(rows),
        complete=False,
        fingerprint="",
        sources={"request": "test"},
        argv=["test"],
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
    writer = ShardWriter(directory, info, rows_per_shard)
    data = [
        DataRow(index, "test", list(prompt), list(answer))
        for index, (prompt, answer) in enumerate(rows)
    ]
    for shard in writer.missing_shards():
        ids = writer.shard_rows(shard)
        writer.write(shard, data[ids.start : ids.stop])
    writer.finish()
    return directory
