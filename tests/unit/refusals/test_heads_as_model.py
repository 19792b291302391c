# SPDX-License-Identifier: Apache-2.0
"""Heads in the model's place: theirs is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm.errors import AdaDecodeError

RECOMMENDED = {"exit_layers": [3], "policy": "cost", "ngram": "first"}


def arguments(model: Path | str, **options: Any) -> EngineArgs:
    return EngineArgs(model=str(model), additional_config={"adadecode": options})


def test_their_model_is_served(model: Path, edited_heads: Callable[..., Path]) -> None:
    heads = edited_heads(recommended=RECOMMENDED)
    args = arguments(heads, ngram="tail")
    config = args.create_engine_config()
    assert config.model_config.model == str(model)
    assert config.model_config.tokenizer == str(model)
    assert config.model_config.served_model_name == str(heads)
    options = config.additional_config["adadecode"]
    assert options["heads"] == str(heads)
    # The user's own stand above what the heads recommend.
    assert (options["policy"], options["ngram"]) == ("cost", "tail")
    assert options["exit_layers"] == [3]
    again = args.create_engine_config()
    assert again.additional_config == config.additional_config


def test_other_names_and_revisions(
    model: Path, edited_heads: Callable[..., Path]
) -> None:
    heads = edited_heads(base_model_revision="v2")
    args = arguments(heads)
    args.served_model_name = "chat"
    config = args.create_engine_config()
    assert config.model_config.served_model_name == "chat"
    assert args.revision == "v2"
    assert config.additional_config["adadecode"]["exit_layers"] == [1, 3]


def test_a_model_without_heads_is_refused_as_before(model: Path) -> None:
    with pytest.raises(AdaDecodeError, match="--adadecode-heads: no exit heads given"):
        arguments(model).create_engine_config()


def test_heads_whose_model_is_not_here(edited_heads: Callable[..., Path]) -> None:
    heads = edited_heads(base_model="some/where/else")
    with pytest.raises(AdaDecodeError, match="belong to some/where/else, which is no"):
        arguments(heads).create_engine_config()


def test_damaged_heads_are_named_as_the_model(
    edited_heads: Callable[..., Path],
) -> None:
    """Nobody gave the flag that names heads elsewhere."""
    heads = edited_heads(hidden_size=-1)
    with pytest.raises(AdaDecodeError) as refused:
        arguments(heads).create_engine_config()
    assert str(refused.value).startswith(f"MODEL {heads}: config.json")
    assert "--adadecode-heads" not in str(refused.value)


def test_recommendations_that_cannot_be_used(edited_heads: Callable[..., Path]) -> None:
    heads = edited_heads(recommended={"threshold": 2})
    with pytest.raises(AdaDecodeError, match=r"config.json recommends cannot be used"):
        arguments(heads).create_engine_config()


def test_named_heads_are_not_looked_for(model: Path, heads: Path) -> None:
    """Heads in the model's place are no model where others are named."""
    args = arguments(heads, heads=str(heads))
    with pytest.raises(Exception, match="adadecode"):
        args.create_engine_config()
    assert args.model == str(heads)
