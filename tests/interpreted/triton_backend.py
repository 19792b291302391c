# SPDX-License-Identifier: Apache-2.0
"""A CPU backend of Triton that does nothing but exist.

`TRITON_INTERPRET=1` runs kernels without any backend; vLLM looks for one to decide
whether Triton can be used. To be installed before vLLM is imported, in every process.
"""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends import backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Register the backend; a second call does nothing."""
    backends.setdefault("cpu", SimpleNamespace(driver=_Driver, compiler=None))
