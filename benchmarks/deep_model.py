# SPDX-License-Identifier: Apache-2.0
"""Makes a model whose layers after the first exit add nothing.

Every early prediction is then right, so the speed of decoding it is the best that the
method can do, at the real cost of every layer: the upper end of the speed formula in
docs/design.md, without trained weights.

The next token is a fixed permutation of the current one, by a wide margin: the LM
head's rows are those of the embedding, permuted. So bfloat16's rounding makes no tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from adadecode_vllm.heads import init_heads


def make_deep_model(
    directory: Path,
    *,
    hidden_size: int,
    num_layers: int,
    first_exit: int,
    vocab_size: int,
    seed: int = 0,
) -> None:
    """Write a random Llama in bfloat16 with exit heads beside it.

    Args:
        directory: Receives ``model/`` and ``heads/``.
        hidden_size: d; the heads have 64 columns, the MLP 2.75 d units.
        num_layers: L.
        first_exit: The layer count after which the residual stream stays as it is.
        vocab_size: V.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=int(2.75 * hidden_size),
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02)
        # The embedding outweighs what the first layers add to the residual stream,
        # about 1 per component and layer. The right token's logit is about 40, all
        # others are below 5.
        embedding = model.model.embed_tokens.weight.mul_(200)
        permutation = torch.randperm(vocab_size)
        model.lm_head.weight[permutation] = embedding * (10 / hidden_size)
        for layer in model.model.layers[first_exit:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory / "model")
    exits = [num_layers // 4, num_layers // 2, 3 * num_layers // 4]
    init_heads(
        str(directory / "model"),
        directory / "heads",
        exits,
        "bfloat16",
        overwrite=True,
    )


def main(
    directory: Annotated[Path, typer.Argument(help="Where to write model/ and heads/")],
    hidden_size: int = 2560,
    num_layers: int = 8,
    vocab_size: int = 2048,
) -> None:
    """Write the model; the defaults have 0.57 B parameters."""
    make_deep_model(
        directory,
        hidden_size=hidden_size,
        num_layers=num_layers,
        first_exit=num_layers // 4,
        vocab_size=vocab_size,
    )
    typer.echo(f"Wrote {directory}/model and {directory}/heads")


if __name__ == "__main__":
    typer.run(main)
