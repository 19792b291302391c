# SPDX-License-Identifier: Apache-2.0
"""What `adadecode data` is asked, and whom it tells how far it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adadecode_vllm.toolkit.data.tasks import Selection


@dataclass(frozen=True)
class DataOptions:
    """What `adadecode data` is asked to do.

    Attributes:
        out: The data directory.
        model: The target model: a directory or a Hugging Face name.
        inputs: Files and directories.
        selection: Which of their records.
        finished: Take the text as it is; otherwise the model answers it.
        chat: Use the chat template; None decides by the tokenizer.
        max_new_tokens: Most tokens of an answer.
        max_length: Most tokens of a prompt, or of a row of finished text; None for
            what the model allows.
        rows_per_shard: Rows of a shard.
        dtype: vLLM's `dtype`.
        engine: Further engine arguments.
        ray_actors: Engines to spread the work over with Ray; None for no Ray.
        ray_address: The Ray cluster; None for one on this machine.
        overwrite: Replace another data set in `out`.
        trust_remote_code: Whether program code that comes with the model may run.
        argv: The command's arguments, for the record.
    """

    out: Path
    model: str
    inputs: tuple[Path, ...]
    selection: Selection = field(default_factory=lambda: Selection("text"))
    finished: bool = False
    chat: bool | None = None
    max_new_tokens: int = 512
    max_length: int | None = None
    rows_per_shard: int = 512
    dtype: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)
    ray_actors: int | None = None
    ray_address: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    argv: tuple[str, ...] = ()


class Progress:
    """Who is told how far the work is; this one does not listen."""

    def start(self, rows: int, done: int) -> None:
        """Take note of an earlier run's rows.

        Args:
            rows: Of the whole work.
            done: Of these, there from an earlier run.
        """

    def unfinished(self, tokens: int) -> None:
        """Take note of answers that are being made.

        Args:
            tokens: What they have now.
        """

    def answered(self, tokens: int, began: float) -> None:
        """Take note of a row that is done, and kept.

        Args:
            tokens: Answered ones of the row.
            began: When its shard was taken up, in seconds since the epoch.
        """
