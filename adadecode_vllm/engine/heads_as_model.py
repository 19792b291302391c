# SPDX-License-Identifier: Apache-2.0
"""``vllm serve HEADS --plugin adadecode``: heads name the model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from adadecode_vllm.config import CONFIG_KEY, OF_THRESHOLDS, parse_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig, Heads, pin_heads
from adadecode_vllm.heads.config import read_config
from adadecode_vllm.heads.files import CONFIG_FILE, heads_named
from adadecode_vllm.heads.hub import is_hub_id
from adadecode_vllm.heads.output import holds_heads

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.adadecode")


def find_model_of_heads(args: EngineArgs) -> Heads | None:
    """Where the model to serve is exit heads, put theirs in its place.

    Their own recommendations become the engine's options, beneath the user's. Nothing
    happens where the model is one.

    Args:
        args: vLLM's engine arguments, which
            :func:`~adadecode_vllm.engine.arguments.lacks_heads` found without heads;
            changed in place, as vLLM itself does for checkpoints of speculators.

    Returns:
        The heads, or None.

    Raises:
        AdaDecodeError: The heads cannot be read, or their model is not here.
    """
    additional = args.additional_config
    options = additional[CONFIG_KEY]
    name = args.model
    heads = _find_heads(name) if options.get("enabled", True) else None
    if heads is None:
        return None
    base = heads.config.base_model
    if not Path(base).is_dir() and not is_hub_id(base):
        raise AdaDecodeError(
            f"MODEL {name}: these heads belong to {base}, which is no directory here "
            f"and no repository's name. Give the model, and --adadecode-heads {name}."
        )
    chosen = with_recommended(heads.config, name, options)
    logger.info(
        "adadecode: serving %s, the model of the heads %s, with %s", base, name, chosen
    )
    args.model = base
    args.revision = args.revision or heads.config.base_model_revision
    args.served_model_name = args.served_model_name or name
    args.additional_config = {**additional, CONFIG_KEY: chosen}
    return heads


def with_recommended(
    heads: ExitHeadsConfig, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """A user's options above those that heads recommend.

    Args:
        heads: The heads' description.
        name: Of the heads: a directory, or a name on the Hub.
        options: What the user chose.

    Returns:
        All options, the heads' name among them.

    Raises:
        AdaDecodeError: What the heads recommend is not valid.
    """
    recommended = dict(heads.recommended or {})
    try:
        parse_config({**recommended, "heads": name})
    except AdaDecodeError as error:
        raise AdaDecodeError(
            f"{name}: the options that its {CONFIG_FILE} recommends cannot be used "
            f"({error}). Correct them, or give the model and --adadecode-heads {name}."
        ) from error
    if not OF_THRESHOLDS.isdisjoint(options):
        recommended.pop("policy", None)
    return {**recommended, **options, "heads": name}


def _find_heads(name: str) -> Heads | None:
    """Exit heads of a name; None where it names something else."""
    path = Path(name)
    if not path.is_dir() and (path.exists() or not is_hub_id(name.partition("@")[0])):
        return None
    directory = path
    try:
        with heads_named("MODEL"):
            pinned, directory = pin_heads(name)
            return Heads(name, pinned, directory, read_config(directory))
    except AdaDecodeError:
        if holds_heads(directory):
            raise
        return None  # vLLM explains what is wrong with a model
