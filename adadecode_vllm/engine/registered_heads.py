# SPDX-License-Identifier: Apache-2.0
"""``vllm serve MODEL --plugin adadecode``: heads that are registered for the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine.heads_as_model import with_recommended
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import Heads
from adadecode_vllm.heads.files import heads_named
from adadecode_vllm.heads.registry import find_registered_heads

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.adadecode")


def find_heads_of_model(args: EngineArgs) -> Heads | None:
    """Take the heads that a registry has on this machine for the model to serve.

    Their own recommendations become the engine's options, beneath the user's.

    Args:
        args: vLLM's engine arguments, which
            :func:`~adadecode_vllm.engine.arguments.lacks_heads` found without heads;
            changed in place.

    Returns:
        The heads; None where AdaDecode is not enabled.

    Raises:
        AdaDecodeError: There are none, or they cannot be used, or they are on the Hub,
            from which nothing is fetched unasked.
    """
    additional = args.additional_config
    options = additional[CONFIG_KEY]
    if not options.get("enabled", True):
        return None
    found = find_registered_heads(args.model)
    if found is None:
        raise AdaDecodeError(
            "--adadecode-heads: no exit heads given. None are registered for "
            f"{args.model}: name its heads, or make some with `adadecode data` and "
            "`adadecode train`."
        )
    if found.directory is None:
        raise AdaDecodeError(
            f"--adadecode-heads: no exit heads given. Those of {args.model} are on the "
            f"Hub; add --adadecode-heads {found.repository} to fetch and use them."
        )
    with heads_named(f"{found.registry}: directory"):
        heads = Heads.find(found.directory)
    chosen = with_recommended(heads.config, heads.name, options)
    logger.info(
        "adadecode: no heads given; using those that %s has for %s, with %s",
        found.registry,
        args.model,
        chosen,
    )
    args.additional_config = {**additional, CONFIG_KEY: chosen}
    return heads
