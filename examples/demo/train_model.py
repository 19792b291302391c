# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's tokenizer and its small Llama model from scratch, on a CPU.

    python train_model.py --work-dir WORK --out model --minutes 45

The work folder keeps the encoded text and a checkpoint; the same command goes on
where a killed run stopped.  ``--export-only`` writes the model of the newest
checkpoint while a run goes on.

The training loss has an auxiliary part, openly a recipe for this demo's own model
(in the spirit of LayerSkip, arXiv 2404.16710): at some intermediate layers an exit
of the same form as AdaDecode's, ``lm_head(T @ final_norm(h))``, learns the next
token too.  These matrices ``T`` are thrown away; ``make_heads.sh`` starts from
identity on the frozen model, as the method says.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger("train_model")

TOKENIZER_SEED = 2
#: In the order of their ids: 0, 1, 2.
SPECIAL_TOKENS = BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = range(3)

#: One user turn is one problem.  System messages are dropped, since the model has
#: never seen one; earlier turns are kept the way problems follow each other in
#: training.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + 'Problem: ' + message['content'] + '\\nSteps:\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def residual_streams(
    model: LlamaForCausalLM, ids: torch.Tensor, layers: Collection[int]
) -> dict[int, torch.Tensor]:
    """Runs the decoder and keeps the residual stream after some layer counts.

    Args:
        model: A Llama model.
        ids: Token ids of shape (batch, tokens). Padding may only stand on the right:
            attention is causal and has no other mask.
        layers: Layer counts to keep, each in [1, L].

    Returns:
        Layer count -> residual stream (batch, tokens, hidden_size), before any norm.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    kept = {}
    for count, layer in enumerate(decoder.layers, start=1):
        # Without a mask the attention falls back to plain causal attention.
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        if count in layers:
            kept[count] = hidden
    return kept


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the model, apart from the training time."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 16
    heads: int = 4
    kv_heads: int = 2
    row_tokens: int = 256
    problem_rows: int = 7
    code_rows: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warm_up_steps: int = 100
    plateau: float = 0.7
    max_steps: int = 10_000
    aux_layers: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    aux_per_step: int = 2
    aux_weight: float = 0.3
    seed: int = 0

    @property
    def rows(self) -> int:
        """Rows of one step."""
        return self.problem_rows + self.code_rows


def train_tokenizer(recipe: Recipe, out: Path) -> None:
    """Trains a byte-level BPE tokenizer and saves it for ``AutoTokenizer``.

    Newlines and digits are tokens of their own: a prompt that ends at a line start
    then has the same tokens as the same text inside a longer one, and numbers are
    read digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = itertools.islice(corpus.training_problems(TOKENIZER_SEED), 6000)
    texts = [problem.prompt + problem.solution for problem in problems]
    texts += corpus.training_code()[::4]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out, save_jinja_files=False)


def pack(documents: Iterable[list[int]], rows: int, width: int) -> np.ndarray:
    """Packs encoded documents into rows that each begin with a new document.

    Args:
        documents: Token ids; what does not fit into a row is cut off.
        rows: Most rows to make; fewer if the documents run out.
        width: Tokens of a row.

    Returns:
        Token ids of shape (rows, width), uint16.
    """
    packed: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) >= width:
            packed.append(row[:width])
            row = []
            if len(packed) == rows:
                break
    return np.array(packed, dtype=np.uint16)


def encode_problems(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Yields encoded training problems with their worked answers, without end."""
    problems = corpus.training_problems(seed)
    while True:
        texts = [p.prompt + p.solution for p in itertools.islice(problems, 1000)]
        for encoding in tokenizer.encode_batch_fast(texts):
            yield [*encoding.ids, EOS_ID]


def encode_code(tokenizer: Tokenizer, width: int) -> np.ndarray:
    """Cuts the training code into rows that begin at line starts.

    Returns:
        Token ids of shape (rows, width), uint16.
    """
    pieces = []
    for text in corpus.training_code():
        piece = ""
        for line in text.splitlines(keepends=True):
            piece += line
            if len(piece) >= 4 * width:
                pieces.append(piece)
                piece = ""
    encoded = tokenizer.encode_batch_fast(pieces)
    rows = [e.ids[:width] for e in encoded if len(e.ids) >= width]
    return np.array(rows, dtype=np.uint16)


def prepare(recipe: Recipe, work: Path) -> None:
    """Writes tokenizer and encoded rows into the work folder, unless they exist."""
    if (work / "code.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    train_tokenizer(recipe, work / "tokenizer")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    width = recipe.row_tokens + 1
    rows = recipe.max_steps * recipe.problem_rows
    problems = encode_problems(tokenizer, corpus.TRAIN_SEED)
    np.save(work / "problems.npy", pack(problems, rows, width))
    np.save(work / "code.npy", encode_code(tokenizer, width))


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Makes the untrained model, residual branches scaled down with depth."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * recipe.layers))
    return model


class AuxiliaryExits(nn.Module):
    """The exits of the auxiliary loss: one square matrix each, identity at first."""

    def __init__(self, layers: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.maps = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.eye(hidden_size)) for layer in layers}
        )

    def forward(self, layer: int, normed: torch.Tensor) -> torch.Tensor:
        """Maps normed states (..., hidden_size) of exit ``layer``."""
        return normed @ self.maps[str(layer)].T


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Linear warm-up, a long plateau, then a line down to 2 % of the peak.

    A plateau rather than a cosine: copying of names and numbers is learned late and
    suddenly, and needs a high rate when it comes.
    """
    warm_up = min(1.0, (step + 1) / recipe.warm_up_steps)
    left = max(0.0, 1 - progress) / (1 - recipe.plateau)
    return recipe.learning_rate * warm_up * (0.02 + 0.98 * min(1.0, left))


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class ThreadChooser:
    """Chooses between one thread and all of them, step by step, by measuring.

    On a machine that other programs use too, threads that wait for each other after
    every operation can be slower than a single one.
    """

    def __init__(self, threads: int) -> None:
        self.seconds = {1: 0.0, threads: 0.0}
        self.steps = 0
        self.current = threads

    def choose(self) -> None:
        """Sets the number of threads for the next step."""
        self.steps += 1
        best = min(self.seconds, key=lambda threads: self.seconds[threads])
        others = [threads for threads in self.seconds if threads != best]
        retry = self.steps % 12 == 0 and others
        self.current = others[0] if retry else best
        torch.set_num_threads(self.current)

    def record(self, seconds: float) -> None:
        """Notes how long that step took."""
        self.seconds[self.current] = seconds


class Trainer:
    """Trains the model and keeps one checkpoint in the work folder."""

    def __init__(self, recipe: Recipe, work: Path, minutes: float) -> None:
        self.recipe = recipe
        self.work = work
        self.seconds = 60 * minutes
        self.model = build_model(recipe)
        self.exits = AuxiliaryExits(recipe.aux_layers, recipe.hidden_size)
        parameters = [*self.model.parameters(), *self.exits.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.parameters = parameters
        self.progress = Progress()
        self.problems = np.load(work / "problems.npy", mmap_mode="r")
        self.code = np.load(work / "code.npy", mmap_mode="r")

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint lies."""
        return self.work / "checkpoint.pt"

    def save(self) -> None:
        """Writes the checkpoint; a kill while writing leaves the older one."""
        draft = self.checkpoint.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "exits": self.exits.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        torch.save(state, draft)
        os.replace(draft, self.checkpoint)

    def load(self) -> bool:
        """Goes on from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.exits.load_state_dict(state["exits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True

    def batch(self) -> torch.Tensor:
        """The rows of one step: problems first, then code; (rows, row_tokens + 1).

        Problem rows are never repeated; code rows are drawn anew in every pass.
        """
        recipe = self.recipe
        steps = self.progress.tokens // recipe.row_tokens // recipe.rows
        first = steps * recipe.problem_rows
        problems = self.problems[first : first + recipe.problem_rows]
        position = steps * recipe.code_rows + np.arange(recipe.code_rows)
        rows = [
            np.random.default_rng(epoch).permutation(len(self.code))[index]
            for epoch, index in zip(*divmod(position, len(self.code)), strict=True)
        ]
        return torch.from_numpy(
            np.concatenate([problems, self.code[rows]]).astype(np.int64)
        )

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Next-token loss of one step plus its auxiliary exits, and parts to log."""
        recipe = self.recipe
        rows = self.batch()
        ids, labels = rows[:, :-1], rows[:, 1:]
        # The exits take turns, so that each step pays for only a few of them.
        chosen = [
            recipe.aux_layers[(step * recipe.aux_per_step + k) % len(recipe.aux_layers)]
            for k in range(recipe.aux_per_step)
        ]
        streams = residual_streams(self.model, ids, {*chosen, recipe.layers})
        total = torch.zeros(())
        parts = {}
        for layer, stream in streams.items():
            normed = self.model.model.norm(stream)
            final = layer == recipe.layers
            logits = self.model.lm_head(normed if final else self.exits(layer, normed))
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none"
            ).view(labels.shape)
            total = total + (1.0 if final else recipe.aux_weight) * losses.mean()
            name = "final" if final else f"exit{layer}"
            parts[f"{name}.problems"] = losses[: recipe.problem_rows].mean().item()
            parts[f"{name}.code"] = losses[recipe.problem_rows :].mean().item()
        return total, parts

    def run(self) -> None:
        """Trains until the time or the steps of the recipe are used up."""
        recipe, progress = self.recipe, self.progress
        last_save = time.monotonic()
        threads = ThreadChooser(torch.get_num_threads())
        while progress.step < recipe.max_steps and progress.seconds < self.seconds:
            started = time.monotonic()
            threads.choose()
            done = max(
                progress.step / recipe.max_steps, progress.seconds / self.seconds
            )
            rate = learning_rate(recipe, progress.step, done)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, parts = self.loss(progress.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += recipe.rows * recipe.row_tokens
            threads.record(time.monotonic() - started)
            progress.seconds += time.monotonic() - started
            # A prime period: the exits that take turns are all seen in the log.
            if progress.step % 19 == 0:
                logger.info(
                    "step %d, %.2f M tokens, %.1f min, lr %.1e, threads %s, %s",
                    progress.step,
                    progress.tokens / 1e6,
                    progress.seconds / 60,
                    rate,
                    threads.seconds,
                    ", ".join(f"{k} {v:.3f}" for k, v in parts.items()),
                )
            if time.monotonic() - last_save > 60:
                self.save()
                last_save = time.monotonic()
        self.save()


def tidy_tokenizer_config(path: Path) -> None:
    """Drops where it was loaded from; names the class that all versions know."""
    values = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only"):
        values.pop(name, None)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2) + "\n")


def export(trainer: Trainer, out: Path) -> None:
    """Writes the model with weights rounded to bfloat16, and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trainer.work / "tokenizer")
    tokenizer.save_pretrained(out, save_jinja_files=False)
    tidy_tokenizer_config(out / "tokenizer_config.json")
    model = trainer.model.bfloat16()
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    provenance = {
        "recipe": dataclasses.asdict(trainer.recipe),
        "progress": dataclasses.asdict(trainer.progress),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    ours = (args.out / "training.json").exists()
    if (args.out / "config.json").exists() and not ours:
        parser.error(f"--out {args.out}: it holds a model that was not made here")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    recipe = Recipe()
    prepare(recipe, args.work_dir)
    trainer = Trainer(recipe, args.work_dir, args.minutes)
    resumed = trainer.load()
    logger.info(
        "%d parameters, %d problem rows, %d code rows, resumed: %s",
        trainer.model.num_parameters(),
        len(trainer.problems),
        len(trainer.code),
        resumed,
    )
    if not args.export_only:
        trainer.run()
    export(trainer, args.out)


if __name__ == "__main__":
    main()
