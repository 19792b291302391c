# SPDX-License-Identifier: Apache-2.0
"""A decoder's layers, split at the exits, and the model families that allow it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config

from adadecode_vllm.engine.families import SUPPORTED_ARCHITECTURES
from adadecode_vllm.errors import AdaDecodeError

_LAYER_PARAMETERS = ("positions", "hidden_states", "residual")

# Classes of vLLM whose ``forward`` is the shared loop and nothing else:
#
#     hidden, residual = embed_input_ids(token_ids), None
#     for layer in layers:
#         hidden, residual = layer(positions, hidden, residual)
#     hidden, _ = norm(hidden, residual)
#
# By name, so that no family is imported but the served one.
SHARED_LOOPS = frozenset(
    f"vllm.model_executor.models.{name}"
    for name in (
        "commandr.CohereModel",
        "gemma.GemmaModel",
        "gemma2.Gemma2Model",
        "gemma3.Gemma3Model",
        "llama.LlamaModel",
        "mistral.MistralModel",
        "mixtral.MixtralModel",
        "nemotron.NemotronModel",
        "olmoe.OlmoeModel",
        "qwen2.Qwen2Model",
        "qwen2_moe.Qwen2MoeModel",
        "qwen3_moe.Qwen3MoeModel",
    )
)


@dataclass(frozen=True)
class Decoder:
    """The parts of a loaded model that segments are made of.

    Attributes:
        embed: (n,) token ids to (n, d) hidden states, scaled where the model does so.
        layers: All L decoder layers.
        norm: The final norm, ``norm(hidden, residual) -> (normed, sum)``.
        compute_logits: (n, d) normed hidden states to (n, V) logits, on every rank.
        lm_head: The model's own LM head; the embedding where it is that.
        logits_processor: What ``compute_logits`` applies to the LM head's output.
        hidden_size: d.
        dtype: The model's dtype.
        device: The model's device.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: Sequence[nn.Module]
    norm: nn.Module
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None]
    lm_head: nn.Module
    logits_processor: Any
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


def find_decoder(model: nn.Module) -> Decoder:
    """Take a loaded vLLM model apart.

    Args:
        model: A causal language model as vLLM loaded it.

    Returns:
        Its parts.

    Raises:
        AdaDecodeError: If the model does not run the shared layer loop.
    """
    inner = getattr(model, "model", None)
    if inner is None or not runs_shared_loop(type(inner)):
        raise AdaDecodeError(
            f"--plugin adadecode: {type(model).__name__} does not run the layer loop "
            "`hidden, residual = layer(positions, hidden, residual)` that early "
            f"exits need. Use one of {', '.join(sorted(SUPPORTED_ARCHITECTURES))}, or "
            "start without --plugin adadecode."
        )
    # Module attributes are typed as tensors or modules; these are methods.
    causal_lm = cast(Any, model)
    layers = list(inner.layers)
    for layer in layers:
        parameters = tuple(inspect.signature(layer.forward).parameters)
        if parameters[: len(_LAYER_PARAMETERS)] != _LAYER_PARAMETERS:
            raise AdaDecodeError(
                f"--plugin adadecode: {type(layer).__name__}.forward takes "
                f"{parameters}, not (positions, hidden_states, residual), so its "
                "tokens cannot be resumed. Start this model without --plugin adadecode."
            )
    return Decoder(
        embed=causal_lm.embed_input_ids,
        layers=layers,
        norm=inner.norm,
        compute_logits=causal_lm.compute_logits,
        # Gemma 2 and Cohere have no LM head but their embedding.
        lm_head=getattr(causal_lm, "lm_head", None) or inner.embed_tokens,
        logits_processor=causal_lm.logits_processor,
        hidden_size=inner.config.hidden_size,
        dtype=inner.norm.weight.dtype,
        device=inner.norm.weight.device,
    )


def runs_shared_loop(cls: type) -> bool:
    """Whether a decoder's class runs one of :data:`SHARED_LOOPS`, perhaps inherited.

    Args:
        cls: The class of a loaded model's decoder.

    Returns:
        False also for subclasses with a ``forward`` of their own.
    """
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    return f"{owner.__module__}.{owner.__qualname__}" in SHARED_LOOPS


def build_segments(
    decoder: Decoder, exit_layers: Sequence[int], vllm_config: VllmConfig
) -> list[nn.Module]:
    """Split a decoder at its exits.

    The segments share the model's layers, so they cost no memory. They are compiled
    the way vLLM compiles the model itself, or run eagerly where the model does.

    Args:
        decoder: The model's parts.
        exit_layers: Layer counts of the exits, strictly increasing. One at 0 reads the
            embedding and ends no segment.
        vllm_config: The engine's configuration.

    Returns:
        Callables ``segment(positions, hidden, residual) -> (hidden, residual)``, one
        more than there are exits after a layer. Segment 0 takes no residual; the last
        one ends with the final norm and returns (normed, None). A single one stands for
        the whole model and cannot be called.
    """
    bounds = [0, *filter(None, exit_layers), len(decoder.layers)]
    segments: list[nn.Module] = []
    for first, last in pairwise(bounds):
        ends_model = last == len(decoder.layers)
        if first == 0 and ends_model:
            # The whole model, which vLLM compiles and runs itself.
            return [_Segment(decoder.layers, decoder.norm)]
        cls = _segment_class(first, last, ends_model)
        with (
            set_current_vllm_config(vllm_config),
            set_model_tag(f"adadecode_layers_{first}_{last}"),
        ):
            norm = decoder.norm if ends_model else None
            segments.append(cls(layers=decoder.layers[first:last], norm=norm))
    return segments


class _Segment(nn.Module):
    """Some consecutive decoder layers, with the final norm if they are the last."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


def _run_first(
    self: Any, positions: torch.Tensor, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    residual = None
    for layer in self.layers:
        hidden_states, residual = layer(positions, hidden_states, residual)
    return hidden_states, residual


def _run_middle(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    for layer in self.layers:
        hidden_states, residual = layer(positions, hidden_states, residual)
    return hidden_states, residual


def _run_last(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    for layer in self.layers:
        hidden_states, residual = layer(positions, hidden_states, residual)
    hidden_states, _ = self.norm(hidden_states, residual)
    return hidden_states


def _segment_class(first: int, last: int, ends_model: bool) -> type[_Segment]:
    """Make a class for one segment.

    vLLM keys compiled graphs by the class's ``forward`` (its code object in memory, its
    qualified name and first line on disk). Segments that shared one would run each
    other's graphs, so each gets a class, a name and a code object of its own.
    """
    template = _run_first if first == 0 else _run_last if ends_model else _run_middle
    name = f"Segment_{first}_{last}{'_end' if ends_model else ''}"
    code = template.__code__.replace(co_name=name, co_qualname=name)
    forward = types.FunctionType(code, template.__globals__, name)
    forward.__qualname__ = f"{name}.forward"
    forward.__annotations__ = dict(template.__annotations__)
    cls = type(name, (_Segment,), {"forward": forward, "__module__": __name__})
    tensors = ["positions", "hidden_states", *(["residual"] if first > 0 else [])]
    return support_torch_compile(
        dynamic_arg_dims={tensor: {0: "n"} for tensor in tensors}
    )(cls)
