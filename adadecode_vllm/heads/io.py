# SPDX-License-Identifier: Apache-2.0
"""Writing heads directories and reading their weights."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from adadecode_vllm.files import writing_together
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.heads.files import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    WEIGHTS_FILE,
    heads_error,
    memory_name,
    open_tensors,
    tensor_name,
)
from adadecode_vllm.heads.output import check_replaceable


def save_heads(
    directory: str | PathLike[str],
    weights: Mapping[int, torch.Tensor],
    config: ExitHeadsConfig,
    draft_token_ids: torch.Tensor | None = None,
    memory: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Write a heads directory, replacing heads that are there.

    Readers never see a half-written file: both files are written under temporary names
    and renamed together. A failure or an interruption leaves the heads that were there;
    a process killed between the renames leaves a directory without `config.json`, which
    is refused, never new weights under an old configuration.

    Args:
        directory: The directory; created with its parents if missing.
        weights: For every layer of `config.exit_layers`, T of shape (d, d), any
            floating dtype, on any device. Stored as `config.dtype`.
        config: The configuration. `draft_vocabulary` is filled in if it is None, and
            `memory` if it is False.
        draft_token_ids: The draft vocabulary: distinct token ids by falling frequency
            in the training text, shape (m,), int64. None for heads without it.
        memory: U for the same layers, of the same shape. None for heads without it.

    Raises:
        AdaDecodeError: The directory's `config.json` or `model.safetensors` is not that
            of exit heads.
        ValueError: The weights or the token ids do not fit the configuration, or
            weights hold NaN or infinity once cast to `config.dtype`.
        OSError: The files cannot be written.
    """
    directory = Path(directory)
    check_replaceable(directory)
    tensors = _prepare(weights, config, "weight", tensor_name)
    if memory is not None:
        config = config.model_copy(update={"memory": True})
        tensors |= _prepare(memory, config, "memory", memory_name)
    elif config.memory:
        raise ValueError("the configuration's memory is true, but there is none")
    if draft_token_ids is not None:
        config = with_draft_vocabulary(config, draft_token_ids)
        tensors[DRAFT_TOKENS] = draft_token_ids.to("cpu", copy=True).contiguous()
    elif config.draft_vocabulary is not None:
        raise ValueError(
            f"the configuration's draft_vocabulary is {config.draft_vocabulary}, but "
            "there are no draft_token_ids"
        )
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / WEIGHTS_FILE, directory / CONFIG_FILE]
    with writing_together(files) as (new_weights, new_config):
        save_tensors(new_weights, tensors, {"format": "pt"})
        # Without what is not set: earlier versions refuse keys that they do not know.
        unset = None if config.memory else {"memory"}
        text = config.model_dump_json(indent=2, exclude_none=True, exclude=unset)
        new_config.write_text(text + "\n", encoding="utf-8")


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        tensors: Its tensors, by name.
        metadata: Goes into its header.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # where the disk is full, for example
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise OSError(str(error)) from error
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def is_identity(weight: torch.Tensor) -> bool:
    """Whether T, (d, d), is exactly the identity, which takes no product."""
    return torch.equal(weight, torch.eye(len(weight)).to(weight))


@dataclass(frozen=True)
class HeadsTensors:
    """All that `model.safetensors` of a heads directory holds, on the CPU.

    Attributes:
        weights: For every layer of `exit_layers`, in that order, T of shape (d, d) and
            the configuration's dtype.
        memory: The same of U; None for heads without memory.
        draft_token_ids: Distinct token ids in [0, vocab_size) by falling frequency in
            the training text, shape (m,), int64; None for heads without a draft
            vocabulary.
    """

    weights: dict[int, torch.Tensor]
    memory: dict[int, torch.Tensor] | None
    draft_token_ids: torch.Tensor | None


def load_tensors(
    directory: str | PathLike[str], config: ExitHeadsConfig
) -> HeadsTensors:
    """Read all tensors of a heads directory, whose file is opened once.

    Args:
        directory: The directory.
        config: Its configuration.

    Returns:
        The tensors.

    Raises:
        AdaDecodeError: The file cannot be read or does not agree with the
            configuration, a matrix holds NaN or infinity, or the token ids are outside
            the vocabulary or not distinct.
    """
    directory = Path(directory)
    with open_tensors(directory, config.stored_tensors, "pt") as tensors:
        return HeadsTensors(
            _exits(tensors, directory, config, tensor_name),
            _exits(tensors, directory, config, memory_name) if config.memory else None,
            _draft_token_ids(tensors, directory, config),
        )


def _exits(
    tensors: Any,
    directory: Path,
    config: ExitHeadsConfig,
    name: Callable[[int], str],
) -> dict[int, torch.Tensor]:
    """Read a matrix of every exit."""
    found = {k: tensors.get_tensor(name(k)) for k in config.exit_layers}
    for layer, matrix in found.items():
        if not torch.isfinite(matrix).all():
            raise heads_error(
                directory,
                f"{name(layer)} holds NaN or infinity",
                "train the heads again, or take an earlier checkpoint",
            )
    return found


def _draft_token_ids(
    tensors: Any, directory: Path, config: ExitHeadsConfig
) -> torch.Tensor | None:
    """Read the draft vocabulary, where there is one."""
    if config.draft_vocabulary is None:
        return None
    token_ids: torch.Tensor = tensors.get_tensor(DRAFT_TOKENS)
    if problem := _draft_tokens_problem(token_ids, config):
        raise heads_error(
            directory,
            problem,
            "make it anew with `adadecode draft-vocabulary`, or take an earlier copy",
        )
    return token_ids


def with_draft_vocabulary(
    config: ExitHeadsConfig, draft_token_ids: torch.Tensor
) -> ExitHeadsConfig:
    """Let a configuration name the size of a draft vocabulary.

    Args:
        config: The configuration; its `draft_vocabulary` is None or that size already.
        draft_token_ids: See `save_heads`.

    Returns:
        The configuration with `draft_vocabulary`.

    Raises:
        ValueError: The token ids do not fit the configuration.
    """
    if problem := _draft_tokens_problem(draft_token_ids, config):
        raise ValueError(problem)
    return config.model_copy(update={"draft_vocabulary": len(draft_token_ids)})


def _draft_tokens_problem(
    token_ids: torch.Tensor, config: ExitHeadsConfig
) -> str | None:
    """Say what is wrong with a draft vocabulary; None when it is valid."""
    if token_ids.dtype != torch.int64:
        return f"{DRAFT_TOKENS} has dtype {token_ids.dtype} instead of torch.int64"
    shape = tuple(token_ids.shape)
    if len(shape) != 1 or shape[0] == 0:
        return f"{DRAFT_TOKENS} has shape {shape} instead of that of a list of tokens"
    if config.draft_vocabulary not in (None, shape[0]):
        return (
            f"{DRAFT_TOKENS} has shape {shape} instead of ({config.draft_vocabulary},)"
        )
    last = config.vocab_size - 1
    outside = token_ids[(token_ids < 0) | (token_ids > last)]
    if len(outside):
        return (
            f"{DRAFT_TOKENS} holds {outside[0]}, but the vocabulary has the ids 0 to "
            f"{last}"
        )
    values, counts = token_ids.unique(return_counts=True)
    if len(values) < len(token_ids):
        return f"{DRAFT_TOKENS} holds {values[counts > 1][0]} more than once"
    return None


def _prepare(
    matrices: Mapping[int, torch.Tensor],
    config: ExitHeadsConfig,
    what: str,
    name: Callable[[int], str],
) -> dict[str, torch.Tensor]:
    """Check the exits' matrices against the configuration; cast them for storage."""
    if sorted(matrices) != config.exit_layers:
        raise ValueError(
            f"{what} for layers {sorted(matrices)}, but the configuration's "
            f"exit_layers are {config.exit_layers}"
        )
    shape = (config.hidden_size, config.hidden_size)
    dtype = getattr(torch, config.dtype)
    tensors = {}
    for layer, matrix in matrices.items():
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"the {what} of exit {layer} has shape {tuple(matrix.shape)} instead "
                f"of {shape}"
            )
        # A clone: safetensors refuses tensors that share memory.
        tensor = matrix.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {what} of exit {layer} holds NaN or infinity")
        tensors[name(layer)] = tensor
    return tensors
