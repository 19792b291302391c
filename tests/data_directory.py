# SPDX-License-Identifier: Apache-2.0
"""Data directories for tests, as `adadecode data` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adadecode_vllm.toolkit.data.info import DatasetInfo
from adadecode_vllm.toolkit.data.shards import DataRow, ShardWriter
from tests.tiny import VOCAB_SIZE


def write_rows(
    directory: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab_size: int,
) -> Path:
    """Write prompts and answers, token ids both.

    Returns:
        The directory.
    """
    info = DatasetInfo(
        model="tiny",
        vocab_size=vocab_size,
        rows=len(rows),
        complete=False,
        fingerprint="",
        sources={"request": "test"},
        argv=["test"],
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
    writer = ShardWriter(directory, info, rows_per_shard=64)
    data = [
        DataRow(index, "test", list(prompt), list(answer))
        for index, (prompt, answer) in enumerate(rows)
    ]
    for shard in writer.missing_shards():
        ids = writer.shard_rows(shard)
        writer.write(shard, data[ids.start : ids.stop])
    writer.finish()
    return directory


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory and of those within it, by its path there."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def write_answers(directory: Path, model: Path, count: int, tokens: int) -> Path:
    """A tiny model's own answers, greedily, as `adadecode data` would write them.

    Args:
        directory: Receives the data.
        model: The model's directory.
        count: Prompts, of four tokens each.
        tokens: Tokens of an answer.
    """
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model)
    prompts = torch.randint(
        3, VOCAB_SIZE, (count, 4), generator=torch.Generator().manual_seed(1)
    )
    output = teacher.generate(
        prompts, max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    rows = [(row[:4].tolist(), row[4:].tolist()) for row in output]
    return write_rows(directory, rows, vocab_size=VOCAB_SIZE)


def write_random_texts(directory: Path) -> Path:
    """40 texts of random tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()

    rows = [(draw(i % 4), draw(10 + i % 7)) for i in range(40)]
    return write_rows(directory, rows, vocab_size=VOCAB_SIZE)
