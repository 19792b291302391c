# SPDX-License-Identifier: Apache-2.0
"""The sizes of a widened model, and which of them fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from transformers import LlamaConfig

from adadecode_vllm.errors import AdaDecodeError

# A size that a preset does not name, or that is smaller there, is the source's.
PRESETS: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_heads": 16,
        "num_kv_heads": 4,
        "head_dim": 128,
        "vocab_size": 32768,
    },
    "draft-cpu": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "vocab_size": 32768,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Sizes:
    """What decides the shapes of a Llama; the names are those of the options."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Sizes:
        """The sizes of a configuration."""
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size + 2)

    @property
    def parameters(self) -> int:
        """Weights of the model; embedding and LM head are not tied."""
        outside = self.hidden_size * (2 * self.vocab_size + 1)
        return self.num_layers * self.layer_parameters + outside


def check_source(config: LlamaConfig, model: str) -> None:
    """Refuse a model that this mathematics does not cover.

    Args:
        config: The model's configuration.
        model: What the user gave as MODEL.

    Raises:
        AdaDecodeError: It has biases, another rotary embedding, or quantized weights.
    """
    if config.attention_bias or config.mlp_bias:
        raise AdaDecodeError(
            f"MODEL {model}: its linear layers have biases, which are not widened; "
            "give a model with attention_bias and mlp_bias false"
        )
    rope = config.rope_parameters
    kind, share = rope["rope_type"], rope.get("partial_rotary_factor") or 1
    if kind != "default" or share != 1:
        what = f"type {kind!r}" if kind != "default" else f"a share of {share}"
        raise AdaDecodeError(
            f"MODEL {model}: its rotary embedding is of {what}, whose frequencies "
            "another head size would change; give a model of rope_type 'default'"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise AdaDecodeError(
            f"MODEL {model}: its weights are quantized; give the unquantized model"
        )


def check_sizes(source: Sizes, target: Sizes) -> None:
    """Refuse sizes into which the source does not fit.

    Args:
        source: Sizes of the small model.
        target: Sizes of the large one.

    Raises:
        AdaDecodeError: With the option to change.
    """
    for field in fields(Sizes):
        has, wants = getattr(source, field.name), getattr(target, field.name)
        option = _option(field.name, wants)
        if wants < has and field.name != "num_kv_heads":
            raise AdaDecodeError(
                f"{option}: smaller than the source's {has}; give at least {has}"
            )
    if target.head_dim % source.head_dim:
        has, wants = source.head_dim, target.head_dim
        raise AdaDecodeError(
            f"{_option('head_dim', wants)}: not a multiple of the source's {has}; "
            f"give one, such as {wants // has * has}"
        )
    if target.num_kv_heads < 1 or target.num_heads % target.num_kv_heads:
        raise AdaDecodeError(
            f"{_option('num_kv_heads', target.num_kv_heads)}: does not divide "
            f"the {target.num_heads} heads; give a divisor"
        )
    if target.hidden_size % target.num_heads:
        raise AdaDecodeError(
            f"{_option('hidden_size', target.hidden_size)}: transformers refuses sizes "
            f"that the {target.num_heads} heads do not divide; give a multiple"
        )
    needed = source.num_kv_heads * copies_needed(source, target)
    if target.num_kv_heads < needed:
        raise AdaDecodeError(
            f"{_option('num_kv_heads', target.num_kv_heads)}: too few, with groups of "
            f"{target.group_size} heads the source's {source.num_kv_heads} key-value "
            f"heads of {source.group_size} need {needed}; give more, or more heads"
        )
    if target.vocab_size > source.vocab_size and (
        target.hidden_size == source.hidden_size
    ):
        raise AdaDecodeError(
            f"{_option('vocab_size', target.vocab_size)}: padded tokens need a spare "
            f"residual dimension; give --hidden-size above {source.hidden_size} too"
        )


def _option(name: str, value: int) -> str:
    return f"--{name.replace('_', '-')} {value}"


def copies_needed(source: Sizes, target: Sizes) -> int:
    """Target key-value heads that hold one of the source's."""
    return math.ceil(source.group_size / target.group_size)


def chosen_sizes(
    preset: str | None, source: Sizes, **sizes: int | None
) -> dict[str, int]:
    """A preset's sizes with those that were given instead.

    Args:
        preset: A key of `PRESETS`, or None.
        source: The source's sizes, where they are larger than the preset's.
        **sizes: None for those that were not given.

    Returns:
        The sizes that are not the source's.

    Raises:
        AdaDecodeError: There is no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise AdaDecodeError(
            f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}"
        )
    given = {name: size for name, size in sizes.items() if size is not None}
    named = PRESETS.get(preset or "", {})
    chosen = {name: max(size, getattr(source, name)) for name, size in named.items()}
    return chosen | given
