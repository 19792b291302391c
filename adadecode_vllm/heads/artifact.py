# SPDX-License-Identifier: Apache-2.0
"""Exit heads that were found on this machine; their files are read once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from adadecode_vllm.heads.config import ExitHeadsConfig, read_config
from adadecode_vllm.heads.files import open_tensors
from adadecode_vllm.heads.hub import pin_heads

if TYPE_CHECKING:
    from adadecode_vllm.heads.io import HeadsTensors


@dataclass(frozen=True)
class Heads:
    """What whoever serves, evaluates or examines heads passes on.

    Attributes:
        name: What the user gave.
        pinned: What finds the same heads in other processes and on other machines; see
            `pin_heads`. For heads of the Hub it ends with their commit.
        directory: Where they are on this machine.
        config: Their description.
    """

    name: str
    pinned: str
    directory: Path
    config: ExitHeadsConfig

    @classmethod
    def find(cls, name_or_path: str | PathLike[str]) -> Heads:
        """Find heads and read their description; the weights come on first use.

        Args:
            name_or_path: See `resolve_heads`.

        Returns:
            The heads.

        Raises:
            AdaDecodeError: There are none of that name, or `config.json` cannot be
                used.
        """
        pinned, directory = pin_heads(name_or_path)
        return cls(str(name_or_path), pinned, directory, read_config(directory))

    def check(self) -> None:
        """See whether the weights' file agrees with the description; needs no torch.

        Raises:
            AdaDecodeError: It does not, or cannot be read.
        """
        with open_tensors(self.directory, self.config.stored_tensors):
            pass

    @cached_property
    def tensors(self) -> HeadsTensors:
        """All matrices and token ids, on the CPU, checked; see `load_tensors`."""
        # Imported here: a description is read where there is no torch.
        from adadecode_vllm.heads.io import load_tensors

        return load_tensors(self.directory, self.config)
