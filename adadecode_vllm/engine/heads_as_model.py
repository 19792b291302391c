# SPDX-License-Identifier: Apache-2.0
"""``vllm serve HEADS --plugin adadecode``: heads name the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from adadecode_vllm.config import CONFIG_KEY, OF_THRESHOLDS, parse_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig, load_heads_config, resolve_heads
from adadecode_vllm.heads.config import MODEL_TYPE
from adadecode_vllm.heads.files import CONFIG_FILE
from adadecode_vllm.heads.hub import is_hub_id

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.adadecode")


def find_model_of_heads(args: EngineArgs) -> None:
    """Where the model to serve is exit heads, put theirs in its place.

    Their own recommendations become the engine's options, beneath the user's. Nothing
    happens where the model is one.

    Args:
        args: vLLM's engine arguments, which
            :func:`~adadecode_vllm.engine.arguments.lacks_heads` found without heads;
            changed in place, as vLLM itself does for checkpoints of speculators.

    Raises:
        AdaDecodeError: The heads cannot be read, or their model is not here.
    """
    additional = args.additional_config
    options = additional[CONFIG_KEY]
    name = args.model
    directory = _heads_directory(name)
    if directory is None or not options.get("enabled", True):
        return
    heads = load_heads_config(directory)
    base = heads.base_model
    if not Path(base).is_dir() and not is_hub_id(base):
        raise AdaDecodeError(
            f"MODEL {name}: these heads belong to {base}, which is no directory here "
            f"and no repository's name. Give the model, and --adadecode-heads {name}."
        )
    chosen = with_recommended(heads, name, options)
    logger.info(
        "adadecode: serving %s, the model of the heads %s, with %s", base, name, chosen
    )
    args.model = base
    args.revision = args.revision or heads.base_model_revision
    args.served_model_name = args.served_model_name or name
    args.additional_config = {**additional, CONFIG_KEY: chosen}


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


def _heads_directory(name: str) -> Path | None:
    """Where exit heads of a name are; None where it names something else."""
    path = Path(name)
    if path.is_dir():
        try:
            values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None  # vLLM explains what is wrong with a model
        found = isinstance(values, dict) and values.get("model_type") == MODEL_TYPE
        return path if found else None
    if path.exists() or not is_hub_id(name.partition("@")[0]):
        return None
    try:
        return resolve_heads(name)
    except AdaDecodeError:
        return None
