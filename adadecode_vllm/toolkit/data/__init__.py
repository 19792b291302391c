# SPDX-License-Identifier: Apache-2.0
"""Training text: reading published files, answering prompts, and its directory format.

A data directory holds `dataset.json` (`DatasetInfo`) and Parquet shards
`part-00000.parquet`, `part-00001.parquet`, ... of rows (`DataRow`): token ids of a
prompt and of the target model's answer, or, for finished text, no prompt and the whole
text as the answer.

Names are imported on first use, so that `--help` does not import pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adadecode_vllm.toolkit.data.shards import (
        DataRow,
        DatasetInfo,
        ShardWriter,
        load_dataset_info,
        read_rows,
    )

__all__ = [
    "DataRow",
    "DatasetInfo",
    "ShardWriter",
    "load_dataset_info",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.shards"), name)
