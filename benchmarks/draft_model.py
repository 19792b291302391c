# SPDX-License-Identifier: Apache-2.0
"""Trains a small draft model for the demo: AdaDecode's rival in speculative decoding.

A Llama with a tenth of the demo's parameters and the demo's own tokenizer, distilled
from scratch on a CPU, in float32:

    OMP_NUM_THREADS=1 python benchmarks/draft_model.py --output examples/demo/draft

It learns the demo's distribution over the next token, where a drafter is asked for it:
in answers, not in prompts. Texts are the demo's greedy answers to training problems and
its continuations of training code, and, as they cost no decoding, worked answers of
templates and training code itself. Nothing held out is trained on.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.workloads import DEMO, demo_corpus

logger = logging.getLogger("draft_model")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Streams of problems of their own: not those of the demo, its tokenizer or its heads.
ANSWERED_SEED, TEMPLATED_SEED = 6, 7


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the draft model, apart from the training time.

    Attributes:
        answers: Training problems that the demo answers.
        open_ended: Share of them in which the demo goes on after its end of text, as
            measurements make it do that fix the number of tokens.
        solutions: Training problems with the template's worked answer.
        continuations: Pieces of training code that the demo continues.
        code: Pieces of training code as they are.
        new_tokens: Most tokens of an answer or a continuation.
        greedy_weight: Weight of the cross entropy with the demo's most probable token,
            beside the KL divergence: greedy drafts are right when that token is.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    answers: int = 2560
    open_ended: float = 0.25
    solutions: int = 6000
    continuations: int = 768
    code: int = 500
    code_tokens: int = 256
    new_tokens: int = 96
    batch: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warm_up_steps: int = 100
    greedy_weight: float = 0.3
    max_steps: int = 1_000_000
    heldout_problems: int = 60
    heldout_code: int = 20
    seed: int = 0


@dataclass
class Text:
    """Token ids of which those from `start` on are to be predicted.

    Attributes:
        ids: The token ids, shape (tokens,).
        start: The first one to predict, at least 1.
        states: The demo's final states that predict them, after its norm; shape
            (tokens - start, hidden size), float16: logits would take eight times that.
    """

    ids: torch.Tensor
    start: int
    states: torch.Tensor | None = None


class Demo:
    """The frozen demo model: answers, distributions, token ids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False
        )
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.end = self.tokenizer.eos_token_id
        # What follows the end of a text is wanted too; texts are cut afterwards.
        self.model.generation_config.eos_token_id = None

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids with the first token of every text."""
        return self.tokenizer(list(texts), verbose=False)["input_ids"]

    def answer(
        self, prompts: Sequence[list[int]], new_tokens: int, uncut: float = 0.0
    ) -> list[Text]:
        """Greedy continuations; all but a share `uncut` stop at the end of text."""
        texts: list[Text] = []
        for start in range(0, len(prompts), 128):
            batch = prompts[start : start + 128]
            width = max(map(len, batch))
            ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
            for row, prompt in zip(ids, batch, strict=True):
                row[width - len(prompt) :] = torch.tensor(prompt)
            mask = torch.zeros_like(ids)
            for row, prompt in zip(mask, batch, strict=True):
                row[width - len(prompt) :] = 1
            with torch.inference_mode():
                rows = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                )
            for row, prompt in zip(rows, batch, strict=True):
                ends = (row[width:] == self.end).nonzero().flatten().tolist()
                whole = not ends or len(texts) < uncut * len(prompts)
                stop = len(row) if whole else width + ends[0] + 1
                text = row[width - len(prompt) : stop].clone()
                texts.append(Text(text, len(prompt)))
            logger.info("%d of %d answers", len(texts), len(prompts))
        return texts

    def add_states(self, texts: Sequence[Text]) -> None:
        """Note the states from which the demo predicts."""
        for batch in batched(sorted(texts, key=lambda text: len(text.ids)), 64):
            with torch.inference_mode():
                states = self.model.model(pad(batch)).last_hidden_state
            for row, text in zip(states, batch, strict=True):
                text.states = row[text.start - 1 : len(text.ids) - 1].half()

    def logits(self, texts: Sequence[Text]) -> torch.Tensor:
        """The demo's logits of all tokens to predict, in order."""
        states = [text.states for text in texts if text.states is not None]
        return self.model.lm_head(torch.cat(states).float())


def batched(texts: Sequence[Text], size: int) -> Iterator[Sequence[Text]]:
    """Cut a list into pieces."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def pad(texts: Sequence[Text]) -> torch.Tensor:
    """One row per text, filled up on the right, where causal attention ignores it."""
    return nn.utils.rnn.pad_sequence([text.ids for text in texts], batch_first=True)


def training_texts(recipe: Recipe, demo: Demo) -> list[Text]:
    """Make the texts to train on, with the demo's states."""
    corpus = demo_corpus()
    rng = Random(recipe.seed)
    asked = itertools.islice(corpus.training_problems(ANSWERED_SEED), recipe.answers)
    prompts = demo.encode(problem.prompt for problem in asked)
    texts = demo.answer(prompts, recipe.new_tokens, recipe.open_ended)
    problems = list(
        itertools.islice(corpus.training_problems(TEMPLATED_SEED), recipe.solutions)
    )
    prompts = demo.encode(problem.prompt for problem in problems)
    wholes = demo.encode(problem.prompt + problem.solution for problem in problems)
    # A prompt ends with a newline, which is a token of its own: the prompt's tokens
    # are the first ones of the whole text's.
    texts += [
        Text(torch.tensor([*ids, demo.end]), len(prompt))
        for ids, prompt in zip(wholes, prompts, strict=True)
    ]
    pieces = code_pieces(demo, recipe, rng)
    texts += [Text(torch.tensor(ids), 1) for ids in pieces[: recipe.code]]
    texts += demo.answer(
        # As long as the prompts of `corpus.heldout_code_prompts`.
        [ids[: rng.randint(50, 150)] for ids in pieces[recipe.code :]],
        recipe.new_tokens,
        uncut=1,
    )
    demo.add_states(texts)
    return texts


def code_pieces(demo: Demo, recipe: Recipe, rng: Random) -> list[list[int]]:
    """Random pieces of the training code that begin at line starts."""
    sources = [
        source.splitlines(keepends=True) for source in demo_corpus().training_code()
    ]
    # Files weigh by their length, so that every line is equally likely.
    weights = [len(lines) for lines in sources]
    count = recipe.code + recipe.continuations
    texts = []
    for lines in rng.choices(sources, weights, k=count):
        first = rng.randrange(len(lines))
        texts.append("".join(lines[first : first + 80])[: 8 * recipe.code_tokens])
    return [ids[: recipe.code_tokens] for ids in demo.encode(texts)]


def build_draft(recipe: Recipe, demo: Demo) -> LlamaForCausalLM:
    """Make the untrained draft model, residual branches scaled down with depth."""
    torch.manual_seed(recipe.seed)
    config = demo.model.config
    draft = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.hidden_size // recipe.heads,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    with torch.no_grad():
        for layer in draft.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * recipe.layers))
    return draft


def predict(draft: LlamaForCausalLM, texts: Sequence[Text]) -> torch.Tensor:
    """The draft's logits of all tokens to predict, in order."""
    states = draft.model(pad(texts)).last_hidden_state
    wanted = [
        row[text.start - 1 : len(text.ids) - 1]
        for row, text in zip(states, texts, strict=True)
    ]
    return draft.lm_head(torch.cat(wanted))


def agreement(draft: LlamaForCausalLM, demo: Demo, texts: Sequence[Text]) -> float:
    """Share of tokens where both models' most probable token is the same."""
    same = total = 0
    for batch in batched(texts, 64):
        with torch.inference_mode():
            equal = predict(draft, batch).argmax(-1) == demo.logits(batch).argmax(-1)
        same += int(equal.sum())
        total += len(equal)
    return same / total


def heldout_texts(recipe: Recipe, demo: Demo) -> dict[str, list[Text]]:
    """The demo's greedy answers to held-out prompts, with its states, by domain."""
    corpus = demo_corpus()
    domains = {
        "problems": corpus.heldout_problems(recipe.heldout_problems),
        "code": corpus.heldout_code_prompts(recipe.heldout_code),
    }
    found = {}
    for name, prompts in domains.items():
        found[name] = demo.answer(demo.encode(prompts), recipe.new_tokens)
        demo.add_states(found[name])
    return found


def endless_batches(texts: Sequence[Text], recipe: Recipe) -> Iterator[Sequence[Text]]:
    """Random batches of texts of about the same length, pass after pass."""
    rng = Random(recipe.seed)
    while True:
        shuffled = rng.sample(texts, len(texts))
        batches: list[Sequence[Text]] = []
        for chunk in batched(shuffled, 16 * recipe.batch):
            chunk = sorted(chunk, key=lambda text: len(text.ids))
            batches += batched(chunk, recipe.batch)
        rng.shuffle(batches)
        yield from batches


def train(
    recipe: Recipe,
    draft: LlamaForCausalLM,
    demo: Demo,
    texts: Sequence[Text],
    minutes: float,
) -> dict[str, Any]:
    """Train until the time or the steps are used up; returns the progress."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in draft.parameters() if p.ndim > 1]},
        {"params": [p for p in draft.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    started = time.monotonic()
    tokens = step = 0
    mean = 0.0
    for batch in endless_batches(texts, recipe):
        seconds = time.monotonic() - started
        done = max(seconds / (60 * minutes), step / recipe.max_steps)
        if done >= 1:
            break
        # Warm-up, then a cosine that follows the clock.
        rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warm_up_steps)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            target = demo.logits(batch)
        output = predict(draft, batch)
        loss = kl_div(
            log_softmax(output, -1),
            log_softmax(target, -1),
            reduction="batchmean",
            log_target=True,
        ) + recipe.greedy_weight * cross_entropy(output, target.argmax(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += len(target)
        mean += (loss.item() - mean) / min(step, 100)
        if step % 100 == 0:
            logger.info(
                "step %d, %.2f M tokens, %.1f min, rate %.1e, mean loss %.3f",
                *(step, tokens / 1e6, seconds / 60, rate, mean),
            )
    seconds = time.monotonic() - started
    return {
        "step": step,
        "predicted_tokens": tokens,
        "seconds": round(seconds, 1),
        "mean_loss": round(mean, 4),
    }


def save(draft: LlamaForCausalLM, demo: Demo, output: Path, report: Any) -> None:
    """Write the model, rounded to bfloat16, the demo's tokenizer and the report."""
    output.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo.path / name, output / name)
    draft.generation_config.do_sample = False
    draft.save_pretrained(output)
    text = json.dumps(report, indent=2) + "\n"
    (output / "training.json").write_text(text, encoding="utf-8")


def make_draft(recipe: Recipe, model: Path, output: Path, minutes: float) -> None:
    """Make the texts, train, judge and save a draft model."""
    demo = Demo(model)
    started = time.monotonic()
    texts = training_texts(recipe, demo)
    predicted = sum(len(text.ids) - text.start for text in texts)
    seconds = round(time.monotonic() - started, 1)
    logger.info("%d texts, %d tokens, %.0f s", len(texts), predicted, seconds)
    draft = build_draft(recipe, demo)
    progress = train(recipe, draft, demo, texts, minutes)
    # Judged as it is shipped: with rounded weights.
    draft = draft.bfloat16().float()
    heldout = heldout_texts(recipe, demo)
    report = {
        "recipe": asdict(recipe),
        "texts": {"seconds": seconds, "tokens_to_predict": predicted},
        "progress": progress,
        "parameters": draft.num_parameters(),
        "agreement_with_demo": {
            name: {
                "prompts": len(answers),
                "tokens": sum(len(text.ids) - text.start for text in answers),
                "same_argmax": round(agreement(draft, demo, answers), 4),
            }
            for name, answers in heldout.items()
        },
        "torch": torch.__version__,
    }
    logger.info("%s", report["agreement_with_demo"])
    save(draft.bfloat16(), demo, output, report)


def main(
    output: Annotated[Path, typer.Option(help="Directory of the draft model")],
    model: Annotated[Path, typer.Option(help="The demo model")] = DEMO / "model",
    minutes: Annotated[
        float, typer.Option(min=0, help="Training, without making the texts")
    ] = 12.0,
    seed: Annotated[int, typer.Option(help="Of texts, weights and order")] = 0,
) -> None:
    """Train a draft model for the demo."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_draft(Recipe(seed=seed), model, output, minutes)


if __name__ == "__main__":
    typer.run(main)
