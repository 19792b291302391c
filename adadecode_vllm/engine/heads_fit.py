# SPDX-License-Identifier: Apache-2.0
"""Whether heads fit the served model and what was asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig, Heads, read_lm_head, same_lm_head


def resolve_draft_vocabulary(config: AdaDecodeConfig, heads: ExitHeadsConfig) -> int:
    """The number of tokens that the exits look at.

    Args:
        config: The user's options.
        heads: The heads' description.

    Returns:
        The number; 0 for the whole vocabulary.

    Raises:
        AdaDecodeError: If the heads rank fewer tokens than were asked for.
    """
    size, stored = config.draft_vocabulary_size, heads.draft_vocabulary
    if size is None:
        return heads.default_draft_vocabulary
    if size == 0:
        return 0
    if stored is None:
        raise AdaDecodeError(
            f"--adadecode-config: draft_vocabulary_size = {size} is refused: "
            f"{config.heads} has no draft vocabulary. Make one with `adadecode "
            "draft-vocabulary`, or remove draft_vocabulary_size."
        )
    if size > stored:
        raise AdaDecodeError(
            f"--adadecode-config: draft_vocabulary_size = {size} is refused: "
            f"{config.heads} ranks only {stored} tokens. Give at most that, or make a "
            "larger ranking with `adadecode draft-vocabulary`."
        )
    return size


def resolve_exit_layers(
    config: AdaDecodeConfig, heads: ExitHeadsConfig
) -> tuple[int, ...]:
    """The exits to use.

    Args:
        config: The user's options.
        heads: The heads' description.

    Returns:
        Layer counts, strictly increasing.

    Raises:
        AdaDecodeError: If there is no head for a requested exit.
    """
    if config.exit_layers is None:
        return tuple(heads.exit_layers)
    missing = sorted(set(config.exit_layers) - set(heads.exit_layers))
    if missing:
        raise AdaDecodeError(
            f"--adadecode-config: exit_layers = {list(config.exit_layers)} is refused: "
            f"{config.heads} has no head after layer {missing[0]}. Choose among "
            f"{list(heads.exit_layers)}, or train heads for that exit."
        )
    return config.exit_layers


def check_heads_fit(heads: Heads, text_config: Any, model: str) -> bool:
    """Refuse heads of another model.

    Args:
        heads: The heads.
        text_config: The served language model's ``hidden_size``, ``vocab_size`` and
            ``num_hidden_layers``.
        model: Its directory, or its name.

    Returns:
        Whether the LM head was compared. One that is not in a local safetensors
        checkpoint, or is quantized there, is looked at once it is loaded.

    Raises:
        AdaDecodeError: If a shape or the LM head's fingerprint differs.
    """
    config = heads.config
    for name, label in (
        ("hidden_size", "hidden size"),
        ("vocab_size", "vocabulary size"),
        ("num_hidden_layers", "number of layers"),
    ):
        served, trained = getattr(text_config, name), getattr(config, name)
        if served != trained:
            raise _wrong_heads(
                heads.name,
                f"their {label} is {trained} and that of {model} is {served}",
                config.base_model,
            )

    lm_head = read_lm_head(model) if Path(model).is_dir() else None
    if lm_head is None:
        return False
    if not same_lm_head(config.lm_head_fingerprint, lm_head.fingerprint):
        raise fingerprint_mismatch(heads.name, model, config.base_model)
    return True


def fingerprint_mismatch(name: str, model: str, base_model: str) -> AdaDecodeError:
    """The error for heads whose LM head is not the served model's."""
    return _wrong_heads(
        name,
        f"they were made for an LM head with other weights than that of {model}",
        base_model,
    )


def _wrong_heads(name: str, reason: str, base_model: str) -> AdaDecodeError:
    return AdaDecodeError(
        f"--adadecode-heads {name}: these heads do not fit: {reason} (they name "
        f"{base_model} as their model). Give the heads of the served model, or make "
        "some with `adadecode data` and `adadecode train`."
    )
