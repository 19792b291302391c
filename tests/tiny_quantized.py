# SPDX-License-Identifier: Apache-2.0
"""Tiny quantized checkpoints, packed by hand; the weights are random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 32
_PER_INT32 = 8
# The value that AWQ keeps at each of the eight places of an int32.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


def _channels(weight: torch.Tensor) -> Tensors:
    """Symmetric int8 with one scale per output channel (compressed-tensors)."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    quantized = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": quantized, "weight_scale": scale}


def _awq(weight: torch.Tensor) -> Tensors:
    """Unsigned 4 bits with a scale and a zero per group of inputs (AutoAWQ)."""
    groups = _groups(weight)
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    values = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    return {
        "qweight": _pack_outputs(values.flatten(0, 1)[:, _awq_places(weight)]),
        "qzeros": _pack_outputs(zero[:, _awq_places(weight)]),
        "scales": scale.half(),
    }


def _gptq(weight: torch.Tensor) -> Tensors:
    """Symmetric 4 bits around 8, with a scale per group of inputs (AutoGPTQ)."""
    groups = _groups(weight)
    scale = groups.abs().amax(dim=1) / 7.5
    values = (groups / scale[:, None] + 8).round().clamp(0, 15).flatten(0, 1)
    inputs = torch.arange(weight.shape[1], dtype=torch.int32)
    return {
        "qweight": _pack_outputs(values.t()).t().contiguous(),
        # AutoGPTQ stores zeros less one.
        "qzeros": _pack_outputs(torch.full_like(scale, 7)),
        "scales": scale.half(),
        "g_idx": inputs // GROUP_SIZE,
    }


def _groups(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) weights of a linear layer as (K / group, group, N)."""
    return weight.t().unflatten(0, (-1, GROUP_SIZE))


def _awq_places(weight: torch.Tensor) -> torch.Tensor:
    """For each place in the packed outputs, the output that stands there."""
    outputs = torch.arange(weight.shape[0]).unflatten(0, (-1, _PER_INT32))
    return outputs[:, _AWQ_ORDER].flatten()


def _pack_outputs(values: torch.Tensor) -> torch.Tensor:
    """Pack (rows, N) values of 4 bits into (rows, N / 8) int32."""
    shifts = 4 * torch.arange(_PER_INT32, dtype=torch.int64)
    packed = (values.long().unflatten(1, (-1, _PER_INT32)) << shifts).sum(dim=-1)
    return packed.to(torch.int32).contiguous()


_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
_SCHEMES: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "w8a8": (
        _channels,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        **_ACTIVATIONS,
                        "dynamic": False,
                        "strategy": "channel",
                    },
                    "input_activations": {**_ACTIVATIONS, "strategy": "token"},
                }
            },
        },
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "gptq": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
}


def quantize(model: Path, directory: Path, scheme: str) -> None:
    """Quantize the linear layers of a checkpoint's decoder layers.

    Args:
        model: A checkpoint of one safetensors file.
        directory: Where to save; created. Embedding, norms and LM head stay as they
            are.
        scheme: ``w8a8`` (int8 weights per channel, activations per token), ``awq`` or
            ``gptq``.
    """
    pack, quantization = _SCHEMES[scheme]
    tensors: Tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            packed = pack(tensor.float())
            tensors.update({f"{layer}.{part}": packed[part] for part in packed})
        else:
            tensors[name] = tensor
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
