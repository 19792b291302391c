# SPDX-License-Identifier: Apache-2.0
"""llvmlite's library object passes for what it is when vLLM looks for kernels.

Symptom without it: once numba is loaded, the next worker that sets itself up in the
same process on a machine without Triton ends with ``AttributeError: '_lib_fn_wrapper'
object has no attribute 'get'``. vLLM goes through everything in ``sys.modules`` that
has a ``__dict__`` and reads it; llvmlite's library has none and hands out a function
of that name, as for any other. numba compiles n-gram lookup, vLLM's and this package's.

Upstream: ``register_kernels`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/triton_utils/dispatcher.py and
``_lib_wrapper.__getattr__`` in
https://github.com/numba/llvmlite/blob/v0.47.0/llvmlite/binding/ffi.py
The change to propose in either: no C function's name begins and ends with two
underscores, and a ``__dict__`` is a dictionary.

Can go when either does. Nothing else of llvmlite changes.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap ``__getattr__`` of llvmlite's library; a second call does nothing."""
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    original = library.__getattr__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __getattr__(self: Any, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return original(self, name)

    setattr(__getattr__, _MARK, original)
    library.__getattr__ = __getattr__
