# SPDX-License-Identifier: Apache-2.0
"""Records like those of the published data sets, and files of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

XSUM = [
    {"document": f"Article {i}\nabout a town.", "summary": f"Town {i}.", "id": str(i)}
    for i in range(30)
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def f{i}(x: int) -> int:\n    """ Add {i}. """\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": "def check(candidate):\n    assert candidate(1) > 0\n",
        "entry_point": f"f{i}",
    }
    for i in range(164)
]
GSM8K = [
    {"question": f"Ann has {i} apples?", "answer": f"She has <<{i}={i}>>{i}.\n#### {i}"}
    for i in range(40)
]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write records in the format that a file's name tells.

    Args:
        path: Ends in `.parquet`, `.jsonl` or `.jsonl.gz`.
        records: What to write.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
