# SPDX-License-Identifier: Apache-2.0
"""Mended faults that can be put back, to see whether the fuzzer finds them.

Each entry installs its defect in the process of the engine with AdaDecode, before the
engine starts, by replacing what mended it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}
"""By name, a function that gives a context in which the defect is there."""
