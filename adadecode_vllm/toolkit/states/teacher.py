# SPDX-License-Identifier: Apache-2.0
"""The frozen model that exit heads learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from adadecode_vllm.engine.families import SUPPORTED_ARCHITECTURES
from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.remote_code import only_trusted_code
from adadecode_vllm.toolkit.states.attention import packed_attention

#: Most tokens of several texts that run as one, under a mask of tokens x tokens.
MASKED_TOKENS = 8192

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_dtype(name: str, device: torch.device | str) -> str:
    """The dtype that `--dtype` means.

    Args:
        name: A key of `DTYPES`, or ``auto``: bfloat16 on GPUs, float32 elsewhere.
        device: Where the model will be.

    Returns:
        A key of `DTYPES`.

    Raises:
        AdaDecodeError: If it is unknown.
    """
    if name == "auto":
        return "bfloat16" if torch.device(device).type == "cuda" else "float32"
    if name not in DTYPES:
        raise AdaDecodeError(
            f"--dtype {name}: unknown dtype; choose auto or one of {', '.join(DTYPES)}"
        )
    return name


class _LayerReached(Exception):
    """What is wanted of a model's run is there."""


class KeyValues:
    """Keys and values of the first layers of one sequence."""

    def __init__(self) -> None:
        """Start with no token."""
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()

    def __len__(self) -> int:
        """Tokens."""
        return self.cache.get_seq_length()

    def beginning(self, tokens: int) -> KeyValues:
        """A copy of the first tokens' keys and values, which may go on otherwise."""
        other = KeyValues()
        for index, layer in enumerate(self.cache.layers):
            keys, values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
            other.cache.update(keys, values, index)
        return other


class Teacher:
    """A causal language model of Transformers, frozen, taken apart for the exits.

    Attributes:
        model: The model.
        name: The name or path it was loaded from.
        num_layers: L.
        hidden_size: d.
        vocab_size: V, rows of the LM head.
        max_length: Longest sequence that the model allows. Packed sequences see all of
            their tokens, so none may be longer than an attention window.
    """

    def __init__(self, model: nn.Module, name: str, attention: str = "sdpa") -> None:
        """Check that the model has the parts that exits need.

        Args:
            model: A causal language model; it is frozen.
            name: Its name or path.
            attention: ``sdpa`` or ``xformers``, what packed sequences run on.

        Raises:
            AdaDecodeError: If it has another form.
        """
        decoder = getattr(model, "model", None)
        lm_head = getattr(model, "lm_head", None)
        if (
            type(model).__name__ not in SUPPORTED_ARCHITECTURES
            or not hasattr(decoder, "layers")
            or not hasattr(decoder, "norm")
        ):
            raise AdaDecodeError(
                f"MODEL {name} ({type(model).__name__}): exit heads cannot be trained "
                "for it, because its layers do not have the form that early exits "
                f"need; use one of {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
            )
        if not isinstance(lm_head, nn.Linear) or lm_head.bias is not None:
            raise AdaDecodeError(
                f"MODEL {name}: its LM head is {type(lm_head).__name__} and not a "
                "linear layer without bias, so exits cannot share it; give the "
                "unquantized checkpoint of a language model"
            )
        config: Any = model.config
        if getattr(config, "final_logit_softcapping", None) or (
            getattr(config, "logit_scale", None) not in (None, 1.0)
        ):
            raise AdaDecodeError(
                f"MODEL {name}: exit heads cannot be trained for it, because it caps "
                "or scales what its LM head says, and training does not; make "
                "untrained ones with `adadecode init-heads`"
            )
        self.model: Any = model.eval().requires_grad_(False)
        if attention == "sdpa":  # also for a model that was not loaded here
            device = lm_head.weight.device
            self.model.set_attn_implementation(packed_attention(attention, device))
        self.name: str = name
        self.attention: str = attention
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = lm_head.weight.shape[0]
        self.max_length: int = min(
            config.max_position_embeddings, _attention_window(config)
        )

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        attention: str = "sdpa",
        *,
        trust_remote_code: bool = False,
    ) -> Teacher:
        """Load a model from a directory or the Hugging Face Hub, safetensors only.

        Args:
            name: Directory or repository name.
            dtype: A key of `DTYPES`.
            device: Where to put it.
            attention: ``sdpa`` or ``xformers``.
            trust_remote_code: Whether program code that comes with the model may run.

        Returns:
            The teacher.

        Raises:
            AdaDecodeError: If it cannot be loaded or has another form.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        implementation = packed_attention(attention, device)
        try:
            with only_trusted_code(f"MODEL {name}"):
                model: Any = AutoModelForCausalLM.from_pretrained(
                    name,
                    dtype=DTYPES[dtype],
                    attn_implementation=implementation,
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                )
                model = model.to(device)
        except (AdaDecodeError, torch.OutOfMemoryError):
            raise
        # Not narrower: neither the errors of a configuration's own checks nor those of
        # the HTTP client derive from anything else.
        except Exception as error:
            raise AdaDecodeError(
                f"MODEL {name}: it cannot be loaded ({first_line(error)}); "
                "give a directory or a Hugging Face name of a causal language model "
                "with safetensors"
            ) from error
        return cls(model, name, attention)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lm_head.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.lm_head.dtype

    @property
    def lm_head(self) -> torch.Tensor:
        """The LM head's weight, (V, d)."""
        return self.model.lm_head.weight

    def eos_token_ids(self) -> set[int]:
        """Tokens that end a text, as generation knows them."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.model.config.eos_token_id
        return set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def groups(self, lengths: Sequence[int], most: int) -> Iterator[range]:
        """Split consecutive sequences into passes of the model.

        Args:
            lengths: Tokens of each sequence.
            most: Most tokens in a pass; a longer sequence runs alone.

        Yields:
            Ranges of indices, in order.
        """
        if self.attention == "sdpa":
            most = min(most, MASKED_TOKENS)
        return split_by_tokens(lengths, most)

    @torch.inference_mode()
    def streams(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """Run sequences, packed without padding, and keep the states at some layers.

        Args:
            sequences: Token ids of each sequence, n tokens in all.
            layers: Layer counts in [0, L].

        Returns:
            By layer count, the residual stream after the final norm, (n, d) in the
            model's dtype: what an exit head reads. For 0 the residual stream is the
            tokens' embeddings, as they enter the first layer; for L the result is what
            the LM head reads.
        """
        lengths = [len(sequence) for sequence in sequences]
        device = self.device
        ids = torch.tensor(
            [[token for sequence in sequences for token in sequence]], device=device
        )
        positions = torch.cat([torch.arange(length) for length in lengths])
        arguments = packed_arguments(lengths, self.attention, device)
        with ExitStack() as stack:
            kept = {
                layer: stack.enter_context(self._kept(layer))
                for layer in layers
                if layer < self.num_layers
            }
            output = self.model.model(
                input_ids=ids,
                position_ids=positions[None].to(device),
                use_cache=False,
                **arguments,
            )
        final = output.last_hidden_state[0]
        norm = self.model.model.norm
        return {
            layer: final if layer == self.num_layers else norm(kept[layer][0])[0]
            for layer in layers
        }

    @torch.inference_mode()
    def extend(
        self, cache: KeyValues, tokens: Sequence[int], layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """Run further tokens of one sequence, no deeper than is asked for.

        Args:
            cache: Keys and values of the sequence so far, of the layers up to the last
                one asked for; receives those of the tokens.
            tokens: (n,) token ids.
            layers: Layer counts below L, the same for all calls with this cache.

        Returns:
            By layer count, the states that `streams` returns, (n, d).
        """
        # Attention without a mask is causal from the first key on: all tokens of an
        # empty cache at once, or one token that sees everything.
        passes = [list(tokens)] if not len(cache) else [[token] for token in tokens]
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        norm = self.model.model.norm
        for ids in passes:
            first = len(cache)
            positions = torch.arange(first, first + len(ids), device=self.device)
            with ExitStack() as stack:
                kept = {
                    layer: stack.enter_context(self._kept(layer)) for layer in layers
                }
                stack.enter_context(self._ended_after(max(layers)))
                self.model.model(
                    input_ids=torch.tensor([ids], device=self.device),
                    position_ids=positions[None],
                    past_key_values=cache.cache,
                    use_cache=True,
                )
            for layer in layers:
                found[layer].append(norm(kept[layer][0])[0])
        return {layer: torch.cat(states) for layer, states in found.items()}

    @contextmanager
    def _ended_after(self, layer: int) -> Iterator[None]:
        """End a run of the model, and this context, after so many layers."""

        def end(*_arguments: Any) -> None:
            raise _LayerReached

        layers = self.model.model.layers
        if layer == 0:
            handle = layers[0].register_forward_pre_hook(end)
        else:
            handle = layers[layer - 1].register_forward_hook(end)
        try:
            with suppress(_LayerReached):
                yield
        finally:
            handle.remove()

    @contextmanager
    def _kept(self, layer: int) -> Iterator[list[torch.Tensor]]:
        """Collect the residual stream after so many layers."""
        kept: list[torch.Tensor] = []

        def take(_module: nn.Module, inputs: Any) -> None:
            kept.append(inputs[0])

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        layers = self.model.model.layers
        if layer == 0:
            handle = layers[0].register_forward_pre_hook(take)
        else:
            handle = layers[layer - 1].register_forward_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()


def _attention_window(config: Any) -> int:
    """The most tokens that every layer's attention reaches back over."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return window if window and slides else config.max_position_embeddings


def packed_arguments(
    lengths: Sequence[int], attention: str, device: torch.device
) -> dict[str, Any]:
    """What tells attention where each packed sequence begins.

    Args:
        lengths: Tokens of each sequence, n in all.
        attention: ``sdpa``: a (1, 1, n, n) mask, true where attention is allowed, and
            none for one sequence alone, which is merely causal and may be long;
            ``xformers``: the lengths themselves.
        device: The model's device.

    Returns:
        Arguments for the model's forward.
    """
    if attention == "xformers":
        return {"sequence_lengths": list(lengths)}
    if len(lengths) == 1:
        return {}
    owner = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(list(lengths))
    ).to(device)
    total = len(owner)
    causal = torch.ones((total, total), dtype=torch.bool, device=device).tril_()
    return {"attention_mask": (causal & (owner[:, None] == owner))[None, None]}


def split_by_tokens(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Split consecutive sequences into groups of at most so many tokens.

    Args:
        lengths: Tokens of each sequence.
        most: Most tokens in a group; a longer sequence stands alone.

    Yields:
        Ranges of indices, in order.
    """
    first, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > first and tokens + length > most:
            yield range(first, index)
            first, tokens = index, 0
        tokens += length
    if first < len(lengths):
        yield range(first, len(lengths))
