# SPDX-License-Identifier: Apache-2.0
"""AdaDecode for vLLM: early predictions by exit heads, verified by the model itself.

Importing this package imports neither torch nor vLLM: vLLM loads its plugins in every
process, long before most of them need either.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adadecode_vllm.config import engine_args

__all__ = ["__version__", "engine_args"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names on first use (PEP 562)."""
    if name == "engine_args":
        from adadecode_vllm.config import engine_args

        return engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
