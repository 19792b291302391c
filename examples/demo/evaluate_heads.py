# SPDX-License-Identifier: Apache-2.0
"""Measures how much the demo's exits predict early, on held-out prompts.

    python evaluate_heads.py --model model --heads heads --out report.json

The model writes greedily in float32; then AdaDecode's policy is walked along that
text.  A cycle starts at the newest verified token.  Going through the exits from the
first, the first one whose top probability exceeds the threshold makes an early
prediction, at most ``cap`` times in a row; then the model verifies, which yields one
more token of its own.

Offline, the walk sees only the text the model really wrote: after a wrong early
prediction the cycle ends.  An engine notices the mistake only when it verifies and may
draft on behind it, up to the cap.  Hence there are two acceptance rates: ``acceptance``
counts only the wrong prediction itself, ``acceptance_floor`` counts as rejected
everything that the cap would still have allowed.
"""

import argparse
import dataclasses
import json
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import corpus
import model_io
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from adadecode_vllm.heads import load_exit_weights, load_heads_config

logger = logging.getLogger("evaluate_heads")


@dataclasses.dataclass(frozen=True)
class Gates:
    """What exits and model say at each generated token of one text.

    Attributes:
        final: The model's own greedy tokens, shape (tokens,).
        certainty: The model's own top probabilities, shape (tokens,).
        tokens: Exit layer -> predicted tokens, shape (tokens,).
        confidence: Exit layer -> top probabilities, shape (tokens,).
    """

    final: torch.Tensor
    certainty: torch.Tensor
    tokens: dict[int, torch.Tensor]
    confidence: dict[int, torch.Tensor]


@torch.inference_mode()
def read_gates(
    model: LlamaForCausalLM,
    heads: dict[int, torch.Tensor],
    prompt: Sequence[int],
    text: Sequence[int],
) -> Gates:
    """Runs the model once over prompt and text and reads every exit on the way.

    Args:
        model: The model, float32.
        heads: Exit layer -> T of shape (d, d).
        prompt: Token ids of the prompt.
        text: Token ids that the model wrote.

    Returns:
        The gates at the positions that predict the tokens of ``text``.
    """
    ids = torch.tensor([[*prompt, *text[:-1]]])
    last = model.config.num_hidden_layers
    streams = model_io.residual_streams(model, ids, {*heads, last})
    tokens, confidence = {}, {}
    for layer, stream in streams.items():
        normed = model.model.norm(stream[0, len(prompt) - 1 :])
        if layer != last:
            normed = nn.functional.linear(normed, heads[layer])
        top = model.lm_head(normed).softmax(-1).max(-1)
        confidence[layer], tokens[layer] = top.values, top.indices
    return Gates(
        final=tokens.pop(last),
        certainty=confidence.pop(last),
        tokens=tokens,
        confidence=confidence,
    )


@dataclasses.dataclass
class Tally:
    """Counts of a walk over many texts."""

    tokens: int = 0
    cycles: int = 0
    unverifiable: int = 0
    accepted: dict[int, int] = dataclasses.field(default_factory=dict)
    rejected: dict[int, int] = dataclasses.field(default_factory=dict)

    def walk(
        self, gates: Gates, text: Sequence[int], threshold: float, cap: int
    ) -> None:
        """Adds the cycles of one text, as the module says."""
        position = 0
        self.tokens += len(text)
        while position < len(text):
            self.cycles += 1
            for early in range(cap):
                if position + early >= len(text):
                    break
                exit_layer = self._first_sure(gates, position + early, threshold)
                if exit_layer is None:
                    break
                guess = int(gates.tokens[exit_layer][position + early])
                if guess != text[position + early]:
                    self._count(self.rejected, exit_layer)
                    self.unverifiable += cap - 1 - early
                    break
                self._count(self.accepted, exit_layer)
            else:
                early = cap
            # One more token than the accepted ones: the model's own.
            position += early + 1

    @staticmethod
    def _first_sure(gates: Gates, position: int, threshold: float) -> int | None:
        for layer in sorted(gates.tokens):
            if gates.confidence[layer][position] > threshold:
                return layer
        return None

    @staticmethod
    def _count(counts: dict[int, int], layer: int) -> None:
        counts[layer] = counts.get(layer, 0) + 1

    def report(self, layers: Sequence[int]) -> dict[str, object]:
        """Shares and counts, for the report."""
        accepted, rejected = sum(self.accepted.values()), sum(self.rejected.values())
        drafted = max(1, accepted + rejected)
        return {
            "tokens": self.tokens,
            "cycles": self.cycles,
            "tokens_per_cycle": round(self.tokens / self.cycles, 3),
            "coverage": round(accepted / self.tokens, 4),
            "acceptance": round(accepted / drafted, 4),
            "acceptance_floor": round(accepted / (drafted + self.unverifiable), 4),
            "exits": {
                str(layer): {
                    "accepted": self.accepted.get(layer, 0),
                    "rejected": self.rejected.get(layer, 0),
                    "share_of_tokens": round(
                        self.accepted.get(layer, 0) / self.tokens, 4
                    ),
                }
                for layer in layers
            },
        }


def gate_report(
    gates: Sequence[Gates], layers: Sequence[int], threshold: float
) -> dict[str, object]:
    """Each exit alone over all generated tokens: how often sure, how often right."""
    certainty = torch.cat([g.certainty for g in gates])
    final = torch.cat([g.final for g in gates])
    report: dict[str, object] = {
        "model_sure": round((certainty > threshold).float().mean().item(), 4)
    }
    for layer in layers:
        tokens = torch.cat([g.tokens[layer] for g in gates])
        sure = torch.cat([g.confidence[layer] for g in gates]) > threshold
        agree = tokens == final
        right = agree[sure].float().mean().item() if sure.any() else 0.0
        report[str(layer)] = {
            "sure": round(sure.float().mean().item(), 4),
            "right_when_sure": round(right, 4),
            "agreement": round(agree.float().mean().item(), 4),
        }
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--problems", type=int, default=240)
    parser.add_argument("--code", type=int, default=40)
    parser.add_argument("--code-tokens", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.75)
    parser.add_argument("--cap", type=int, default=5)
    parser.add_argument("--exit-layers", type=int, nargs="+", default=None)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    model, tokenizer = model_io.load(args.model)
    config = load_heads_config(args.heads)
    heads = load_exit_weights(args.heads, config)
    layers = args.exit_layers or config.exit_layers
    heads = {layer: heads[layer].float() for layer in layers}

    problems = corpus.heldout_problems_with_solutions(args.problems)
    answers = model_io.greedy(
        model, tokenizer, [problem.prompt for problem in problems], 128
    )
    written = [
        str(tokenizer.decode(text, skip_special_tokens=True)) for _, text in answers
    ]
    pairs = list(zip(problems, written, strict=True))
    kinds: dict[str, list[bool]] = {}
    for problem, answer in pairs:
        right = corpus.parse_answer(answer) == problem.answer
        kinds.setdefault(problem.kind, []).append(right)
    results: dict[str, dict[str, object]] = {
        "held_out_problems": {
            "prompts": len(problems),
            "answers_right": sum(map(sum, kinds.values())) / len(problems),
            "text_as_reference": sum(answer == p.solution for p, answer in pairs)
            / len(problems),
            "answers_right_by_kind": {
                kind: round(sum(rights) / len(rights), 3)
                for kind, rights in sorted(kinds.items())
            },
        },
        "held_out_code": {"prompts": args.code},
    }
    code = model_io.greedy(
        model, tokenizer, corpus.heldout_code_prompts(args.code), args.code_tokens
    )
    for name, texts in (("held_out_problems", answers), ("held_out_code", code)):
        tally, gates = Tally(), []
        for prompt, text in texts:
            gates.append(read_gates(model, heads, prompt, text))
            tally.walk(gates[-1], text, args.threshold, args.cap)
        results[name].update(tally.report(layers))
        results[name]["gates"] = gate_report(gates, layers, args.threshold)

    settings = ("problems", "code", "code_tokens", "threshold", "cap")
    report = {
        "command": "python evaluate_heads.py --model model --heads heads "
        "--out report.json "
        + " ".join(f"--{n.replace('_', '-')} {getattr(args, n)}" for n in settings),
        "seed": corpus.HELD_OUT_SEED,
        "exit_layers": layers,
        "dtype": "float32",
        "hardware": f"CPU, {args.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "adadecode-vllm": config.library_version,
        },
        "seconds": round(time.monotonic() - started),
        **results,
    }
    output = json.dumps(report, indent=2) + "\n"
    if args.out:
        args.out.write_text(output)
    print(output, end="")


if __name__ == "__main__":
    main()
