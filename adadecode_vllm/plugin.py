# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Make ``--plugin adadecode`` and ``additional_config["adadecode"]`` known.

    Changes nothing for engines that do not ask for AdaDecode. Cheap and idempotent.
    """
    # Imported here because importing this module must never fail: vLLM would only log
    # that and go on without the plugin.
    from adadecode_vllm.compat import facts
    from adadecode_vllm.patches import (
        engine_args,
        v2_async_scheduling,
        v2_custom_class,
    )

    engine_args.install()
    v2_custom_class.install()
    if facts().async_scheduling_by_method:
        v2_async_scheduling.install()
