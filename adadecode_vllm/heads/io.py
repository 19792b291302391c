# SPDX-License-Identifier: Apache-2.0
"""Writing heads directories and reading their weights."""

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.heads.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    heads_error,
    tensor_name,
    unreadable,
    weights_path,
)


def save_heads(
    directory: str | PathLike[str],
    weights: Mapping[int, torch.Tensor],
    config: ExitHeadsConfig,
) -> None:
    """Write a heads directory, replacing heads that are there.

    Readers never see a half-written file: both files are written under temporary names
    and renamed. An interruption between the two renames leaves a directory without
    `config.json`, which is refused, never new weights under an old configuration.

    Args:
        directory: The directory; created with its parents if missing.
        weights: For every layer of `config.exit_layers`, T of shape (d, d), any
            floating dtype, on any device. Stored as `config.dtype`.
        config: The configuration.

    Raises:
        ValueError: The weights do not fit the configuration, or hold NaN or infinity
            once cast to `config.dtype`.
        OSError: The files cannot be written.
    """
    directory = Path(directory)
    tensors = _prepare(weights, config)
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f".tmp-{os.getpid()}"
    new_weights = directory / (WEIGHTS_FILE + suffix)
    new_config = directory / (CONFIG_FILE + suffix)
    try:
        save_file(tensors, new_weights, metadata={"format": "pt"})
        # Without what is not set: earlier versions refuse keys that they do not know.
        text = config.model_dump_json(indent=2, exclude_none=True)
        new_config.write_text(text + "\n", encoding="utf-8")
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        new_weights.replace(directory / WEIGHTS_FILE)
        new_config.replace(directory / CONFIG_FILE)
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)


def load_exit_weights(
    directory: str | PathLike[str], config: ExitHeadsConfig
) -> dict[int, torch.Tensor]:
    """Read the weights of a heads directory.

    Args:
        directory: The directory that `load_heads_config` accepted.
        config: What it returned.

    Returns:
        For every layer of `config.exit_layers`, in that order, T of shape (d, d) and
        dtype `config.dtype` on the CPU.

    Raises:
        AdaDecodeError: The file cannot be read, or a weight is NaN or infinite.
    """
    directory = Path(directory)
    try:
        tensors = load_file(weights_path(directory))
    except SafetensorError as error:
        raise unreadable(directory, error) from error
    weights = {layer: tensors[tensor_name(layer)] for layer in config.exit_layers}
    for layer, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise heads_error(
                directory,
                f"{tensor_name(layer)} holds NaN or infinity",
                "train the heads again, or take an earlier checkpoint",
            )
    return weights


def _prepare(
    weights: Mapping[int, torch.Tensor], config: ExitHeadsConfig
) -> dict[str, torch.Tensor]:
    """Check the weights against the configuration and cast them for storage."""
    if sorted(weights) != config.exit_layers:
        raise ValueError(
            f"weights for layers {sorted(weights)}, but the configuration's "
            f"exit_layers are {config.exit_layers}"
        )
    shape = (config.hidden_size, config.hidden_size)
    dtype = getattr(torch, config.dtype)
    tensors = {}
    for layer, weight in weights.items():
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"the weight of exit {layer} has shape {tuple(weight.shape)} instead "
                f"of {shape}"
            )
        # A clone: safetensors refuses tensors that share memory.
        tensor = weight.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weight of exit {layer} holds NaN or infinity")
        tensors[tensor_name(layer)] = tensor
    return tensors
