# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's exit heads against the frozen model, on a CPU.

    python train_heads.py --model model --out heads --exit-layers 2 4 8

Per exit only the (d, d) matrix T of ``lm_head(T @ final_norm(h))`` is trained, from
identity, on the KL divergence from the model's own final distribution.  The residual
streams are computed once and kept in memory.
"""

import argparse
import itertools
import json
import logging
import math
import time
from pathlib import Path

import corpus
import model_io
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from train_model import encode_code, encode_problems, pack
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from adadecode_vllm.heads import ExitHeadsConfig, lm_head_fingerprint, save_heads

logger = logging.getLogger("train_heads")

ROW_TOKENS = 256
ROWS_SEED = 3
GENERATED_SEED = 4


def make_rows(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problem_rows: int,
    code_rows: int,
    generated: int,
) -> torch.Tensor:
    """Collects training text: written problems, code, and the model's own answers.

    The model's own greedy answers are what the exits see in use; they come from
    training phrasings, with numbers and names drawn anew.

    Returns:
        Token ids of shape (rows, ROW_TOKENS).
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    code = encode_code(backend, ROW_TOKENS)
    picked = np.random.default_rng(ROWS_SEED).permutation(len(code))[:code_rows]
    problems = itertools.islice(corpus.training_problems(GENERATED_SEED), generated)
    prompts = [problem.prompt for problem in problems]
    answers = model_io.greedy(model, tokenizer, prompts, max_new_tokens=120)
    parts = [
        pack(encode_problems(backend, ROWS_SEED), problem_rows, ROW_TOKENS),
        pack(([*prompt, *text] for prompt, text in answers), generated, ROW_TOKENS),
        code[picked],
    ]
    logger.info("rows: %s", [len(part) for part in parts])
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@torch.inference_mode()
def cache_streams(
    model: LlamaForCausalLM, rows: torch.Tensor, layers: list[int]
) -> dict[int, torch.Tensor]:
    """Computes normed residual streams of all tokens.

    Returns:
        Layer count -> (tokens, hidden_size) float32 after the final norm.
    """
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for batch in rows.split(16):
        for layer, stream in model_io.residual_streams(model, batch, layers).items():
            kept[layer].append(model.model.norm(stream).flatten(0, 1))
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def train(
    model: LlamaForCausalLM,
    streams: dict[int, torch.Tensor],
    exit_layers: list[int],
    *,
    epochs: int,
    batch_tokens: int,
    peak_rate: float,
    seed: int,
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """Trains one matrix per exit; the exits share each batch and its teacher.

    Args:
        model: The frozen model.
        streams: What ``cache_streams`` returned, with the last layer's for the teacher.
        exit_layers: Layer counts of the exits.
        epochs: Passes over the tokens.
        batch_tokens: Tokens of a batch.
        peak_rate: Adam's learning rate after a warm-up of 3 %; cosine down to zero.
        seed: Seed of the order of the tokens.

    Returns:
        Layer count -> T of shape (d, d), and layer count -> KL in nats, averaged over
        the last tenth of the steps.
    """
    teacher = streams[model.config.num_hidden_layers]
    size = model.config.hidden_size
    maps = {layer: nn.Parameter(torch.eye(size)) for layer in exit_layers}
    optimizer = torch.optim.Adam(maps.values(), lr=peak_rate)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(teacher) // batch_tokens
    steps = epochs * per_epoch
    warm_up = max(1, round(0.03 * steps))
    tail: dict[int, list[float]] = {layer: [] for layer in exit_layers}
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        position = step % per_epoch
        if position == 0:
            order = torch.randperm(len(teacher), generator=generator)
        picked = order[position * batch_tokens : (position + 1) * batch_tokens]
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = (
            peak_rate * rate * min(1.0, (step + 1) / warm_up)
        )
        target = model.lm_head(teacher[picked]).log_softmax(-1)
        losses = {}
        for layer, weight in maps.items():
            # Indexing copies: the result is no inference-mode tensor any more.
            normed = streams[layer][picked]
            logits = model.lm_head(nn.functional.linear(normed, weight))
            losses[layer] = nn.functional.kl_div(
                logits.log_softmax(-1), target, reduction="batchmean", log_target=True
            )
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            values = ", ".join(f"{k}: {v.item():.3f}" for k, v in losses.items())
            logger.info("step %d of %d, KL %s", step + 1, steps, values)
        if step >= 0.9 * steps:
            for layer, loss in losses.items():
                tail[layer].append(loss.item())
    weights = {layer: weight.detach() for layer, weight in maps.items()}
    return weights, {layer: float(np.mean(values)) for layer, values in tail.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--exit-layers", type=int, nargs="+", required=True)
    parser.add_argument("--base-model", default="examples/demo/model")
    parser.add_argument("--problem-rows", type=int, default=400)
    parser.add_argument("--code-rows", type=int, default=150)
    parser.add_argument("--generated", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    model, tokenizer = model_io.load(args.model)
    config = ExitHeadsConfig(
        exit_layers=args.exit_layers,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        num_hidden_layers=model.config.num_hidden_layers,
        base_model=args.base_model,
        lm_head_fingerprint=lm_head_fingerprint(model.lm_head.weight),
    )
    rows = make_rows(
        model, tokenizer, args.problem_rows, args.code_rows, args.generated
    )
    layers = [*args.exit_layers, model.config.num_hidden_layers]
    weights, divergence = train(
        model,
        cache_streams(model, rows, layers),
        args.exit_layers,
        epochs=args.epochs,
        batch_tokens=args.batch_tokens,
        peak_rate=args.learning_rate,
        seed=args.seed,
    )
    save_heads(args.out, weights, config)
    provenance = {
        "arguments": {
            name: value
            for name, value in vars(args).items()
            if name not in ("model", "out", "threads")
        },
        "tokens": rows.numel(),
        "kl_nats": divergence,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
