# SPDX-License-Identifier: Apache-2.0
"""Heads directories that can be published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from adadecode_vllm.config import DEFAULT_CAP
from adadecode_vllm.heads.config import MODEL_TYPE, ExitHeadsConfig
from adadecode_vllm.toolkit.publishing.card import render_card, replace_card

if TYPE_CHECKING:
    import torch


def make_speculators_config(
    base_model: str,
    architectures: Sequence[str] = (),
    speculative_tokens: int = DEFAULT_CAP,
) -> dict[str, Any]:
    """Describe the heads in the form of the `speculators` project.

    Args:
        base_model: Name or path of the model that verifies.
        architectures: `architectures` of its `config.json`.
        speculative_tokens: Most early predictions at a time.

    Returns:
        The value of `speculators_config`. `greedy` with its defaults says that a draft
        is accepted if it is the model's own token. vLLM does not start from this block:
        there is no `speculators_model_type` beside it, `--adadecode-heads` is the way.
    """
    return {
        "algorithm": MODEL_TYPE,
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": speculative_tokens,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {
            "name_or_path": base_model,
            "architectures": list(architectures),
        },
    }


def save_pretrained(
    directory: str | PathLike[str],
    weights: Mapping[int, torch.Tensor],
    config: ExitHeadsConfig,
    *,
    draft_token_ids: torch.Tensor | None = None,
    memory: Mapping[int, torch.Tensor] | None = None,
    architectures: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> ExitHeadsConfig:
    """Write a heads directory that can be published: configuration, weights and card.

    Args:
        directory: The directory; created with its parents if missing, heads in it are
            replaced.
        weights: T per exit layer, shape (d, d), as `save_heads` takes them.
        config: The configuration. `speculators_config` is filled in if it is None, and
            `draft_vocabulary` where there are token ids, and `memory` where there is.
        draft_token_ids: The draft vocabulary, as `save_heads` takes it.
        memory: U per exit layer, as `save_heads` takes it.
        architectures: `architectures` of the base model's `config.json`.
        training: What made the heads, for the card; see `write_card`.
        evaluation: `evaluation.json`, decoded, for the card.

    Returns:
        The configuration that was written.

    Raises:
        AdaDecodeError: The evaluation is incomplete; nothing was written.
        ValueError: The weights or the token ids do not fit the configuration; nothing
            was written.
        OSError: The files cannot be written.
    """
    from adadecode_vllm.heads.io import save_heads, with_draft_vocabulary

    if config.speculators_config is None:
        block = make_speculators_config(config.base_model, architectures)
        config = config.model_copy(update={"speculators_config": block})
    if draft_token_ids is not None:  # the card names it
        config = with_draft_vocabulary(config, draft_token_ids)
    if memory is not None:
        config = config.model_copy(update={"memory": True})
    # Rendered before anything is replaced: figures that are wrong must not leave new
    # heads under an old card.
    card = render_card(config, str(directory), training=training, evaluation=evaluation)
    save_heads(directory, weights, config, draft_token_ids, memory)
    replace_card(directory, card)
    return config
