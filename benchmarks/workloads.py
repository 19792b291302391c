# SPDX-License-Identifier: Apache-2.0
"""Workloads: named lists of prompts for speed measurements.

XSum, HumanEval and GSM8K are read from their published files by the same code as
`adadecode data`, which also chooses the rows. The others need no download. Nothing is
drawn at random that the seed does not decide, and the hash of a workload's token ids
tells whether two results were measured on the same prompts.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Final

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.prompts import (
    TargetModel,
    load_model,
    tokenize,
    use_chat_template,
)
from adadecode_vllm.toolkit.data.tasks import (
    Selection,
    input_files,
    select_examples,
)

logger = logging.getLogger(__name__)

DEMO: Final = Path(__file__).resolve().parents[1] / "examples" / "demo"

WORKLOADS: Final[Mapping[str, str]] = {
    "xsum": "XSum, 1,000 rows of the test split; needs the published files",
    "humaneval": "HumanEval, all 164 rows; needs the published file",
    "gsm8k": "GSM8K, 1,000 rows of the test split; needs the published files",
    "problems": "held-out arithmetic word problems, in the demo model's domain",
    "code": "held-out standard-library code to complete, in the demo model's domain",
    "prose": "English prose of the Python reference, outside the demo model's domain",
    "random": "random token ids, which no model can foresee",
    "text": "your own: the field `text` of .jsonl, .json or .parquet, or .txt files",
}
PUBLISHED: Final = ("xsum", "humaneval", "gsm8k")

_OUTPUT_TOKENS = {"problems": 96, "code": 96, "prose": 96, "random": 128}
_PAPER_OUTPUT_TOKENS = 512
_BUILT_IN_COUNT = 32
_RANDOM_PROMPT_TOKENS = 32
_PROSE_CHARACTERS = 240
# Templates may show a date; the token ids must not change with it.
_DATE = datetime(2025, 1, 1)
# The data module's messages are written for `adadecode data`. In this order.
_FLAGS = (
    ("--input", "--dataset-path"),
    (", or correct --split", ""),
    ("--split is", "the workload needs"),
    ("--task or --field", "--dataset-name"),
    ("--task", "--dataset-name"),
    ("--count", "--num-prompts"),
    ("pass --plain", "give plain prompts"),
)


@dataclass(frozen=True)
class Workload:
    """Prompts of a measurement.

    Attributes:
        name: A key of `WORKLOADS`.
        prompts: Token ids as the model sees them, chat template and all.
        texts: The same for HTTP clients: plain prompts, or the user's messages where
            `chat` is true. Those of `random` need not give the same token ids again.
        chat: Whether the prompts went through the chat template.
        output_tokens: Most new tokens.
        description: Source, split and number in one line.
        sha256: Hash of the token ids.
        references: The published answers; empty where there are none.
    """

    name: str
    prompts: list[list[int]]
    texts: list[str]
    chat: bool
    output_tokens: int
    description: str
    sha256: str
    references: list[str] = field(default_factory=list)


def load_workload(
    name: str,
    model: str | Path,
    *,
    path: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    output_tokens: int | None = None,
    max_model_len: int | None = None,
) -> Workload:
    """Make a workload for a model.

    The chat template is applied where the tokenizer has one and the workload is read
    from a file.

    Args:
        name: A key of `WORKLOADS`.
        model: The model's directory or Hugging Face name; its weights are not read.
        path: File or directory of `xsum`, `humaneval`, `gsm8k` and `text`.
        count: Number of prompts; None for the paper's, all of `text`, or 32.
        seed: Decides which prompts.
        output_tokens: Most new tokens; None for the workload's own number.
        max_model_len: Most tokens of prompt and output; None for the model's own
            limit. Prompts that do not fit are left out, and their number is logged.

    Raises:
        AdaDecodeError: An option does not fit the workload or the model, the files
            cannot be used, or no prompt fits.
    """
    _check(name, path, count, output_tokens)
    target = load_model(str(model))
    if output_tokens is None:
        output_tokens = _OUTPUT_TOKENS.get(name, _PAPER_OUTPUT_TOKENS)
    applied = False
    references: list[str] = []
    number = count or _BUILT_IN_COUNT
    if path is not None:
        applied = use_chat_template(target, None, name, finished=False)
        texts, prompts, references = _read(
            Selection(name, None, count, seed), path, target, applied
        )
    elif name == "random":
        prompts = _random_ids(target, number, seed)
        texts = target.tokenizer.batch_decode(prompts)
    else:
        texts = _plain_texts(name, number, seed)
        prompts = target.tokenizer(texts, verbose=False)["input_ids"]
    # vLLM takes -1 for: as long as possible.
    given = max_model_len is not None and max_model_len > 0
    limit = max_model_len if given else target.max_length
    kept = _fitting(prompts, output_tokens, limit)
    prompts = [prompts[index] for index in kept]
    source = WORKLOADS[name].partition(";")[0]
    if name in PUBLISHED:
        source = f"{name}, split test of {path}"
    elif path is not None:
        source = f"texts of {path}"
    form = "chat template" if applied else "plain"
    return Workload(
        name=name,
        prompts=prompts,
        texts=[texts[index] for index in kept],
        references=[references[index] for index in kept] if references else [],
        chat=applied,
        output_tokens=output_tokens,
        description=f"{source}: {len(prompts):,} prompts, {form}, seed {seed}",
        sha256=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    )


def demo_corpus() -> ModuleType:
    """The demo's module of texts, which imports its neighbour as scripts do."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module("corpus")
    finally:
        sys.path.remove(str(DEMO))


def _check(
    name: str, path: Path | None, count: int | None, output_tokens: int | None
) -> None:
    """Refuse options that cannot be meant."""
    if name not in WORKLOADS:
        raise AdaDecodeError(
            f"--dataset-name {name}: unknown workload; choose one of "
            f"{', '.join(WORKLOADS)}"
        )
    for flag, number in (("--num-prompts", count), ("--output-len", output_tokens)):
        if number is not None and number < 1:
            raise AdaDecodeError(
                f"{flag} {number}: nothing would be measured; give at least 1"
            )
    from_files = name in (*PUBLISHED, "text")
    if from_files and path is None:
        what = "the published files" if name in PUBLISHED else "your prompts"
        raise AdaDecodeError(
            f"--dataset-path: the workload {name} is read from files; give the file or "
            f"directory of {what}, or choose with --dataset-name one that needs none: "
            f"{', '.join(_OUTPUT_TOKENS)}"
        )
    if not from_files and path is not None:
        raise AdaDecodeError(
            f"--dataset-path {path}: the workload {name} makes its own prompts; drop "
            "it, or choose --dataset-name text to use the file"
        )


def _read(
    selection: Selection, path: Path, target: TargetModel, chat: bool
) -> tuple[list[str], list[list[int]], list[str]]:
    """Texts, ids and answers; the data module's refusals in the benchmark's words."""
    if selection.task != "text":
        selection = replace(selection, split="test")
    try:
        examples, blank = select_examples(selection, input_files(selection, [path]))
        rows = tokenize(examples, target, chat=chat, finished=False, date=_DATE)
    except AdaDecodeError as error:
        message = str(error)
        for theirs, ours in _FLAGS:
            message = message.replace(theirs, ours)
        raise AdaDecodeError(message) from error
    except ModuleNotFoundError as error:
        raise AdaDecodeError(
            f"--dataset-path {path}: {error.name} is needed to read Parquet; install "
            "this package with its extra `train`, or give JSON Lines"
        ) from error
    if blank:
        logger.warning("%d records without text were left out", blank)
    texts = [e.message if chat else e.plain for e in examples]
    return texts, [r.ids for r in rows], [e.reference for e in examples]


def _fitting(
    prompts: list[list[int]], output_tokens: int, limit: int | None
) -> list[int]:
    """Places of the prompts that fit together with the output."""
    if limit is None:
        return list(range(len(prompts)))
    longest = limit - output_tokens
    kept = [i for i, ids in enumerate(prompts) if 0 < len(ids) <= longest]
    if not kept:
        shortest = min(map(len, prompts))
        raise AdaDecodeError(
            f"--max-model-len {limit}: none of the {len(prompts):,} prompts fits "
            f"beside {output_tokens} new tokens, the shortest has {shortest}; raise "
            "it, lower --output-len, or choose another --dataset-name"
        )
    if left_out := len(prompts) - len(kept):
        logger.warning(
            "%s of %s prompts were left out: more than %d tokens, which do not fit "
            "into %d beside %d new ones",
            *(f"{left_out:,}", f"{len(prompts):,}", longest, limit, output_tokens),
        )
    return kept


def _random_ids(target: TargetModel, count: int, seed: int) -> list[list[int]]:
    """Ids of tokens that have a text: no special ones, no padding of the LM head."""
    size = min(target.vocab_size, len(target.tokenizer))
    usable = sorted(set(range(size)) - set(target.tokenizer.all_special_ids))
    rng = Random(seed)
    return [rng.choices(usable, k=_RANDOM_PROMPT_TOKENS) for _ in range(count)]


def _plain_texts(name: str, count: int, seed: int) -> list[str]:
    if name == "prose":
        return _prose(count, seed)
    corpus = demo_corpus()
    make = (
        corpus.heldout_problems if name == "problems" else corpus.heldout_code_prompts
    )
    # The default seed gives the prompts that the demo is evaluated on.
    return make(count, corpus.HELD_OUT_SEED + seed)


def _prose(count: int, seed: int) -> list[str]:
    """Beginnings of long paragraphs of the language reference that `help()` shows.

    It comes with every Python; the demo was trained on the standard library without it.
    """
    from pydoc_data.topics import topics

    beginnings = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            # Indented text is code or grammar, other signs begin lists and headings.
            if paragraph[:1].isupper() and len(text) > _PROSE_CHARACTERS:
                beginnings.append(text[:_PROSE_CHARACTERS].rpartition(" ")[0])
    beginnings = list(dict.fromkeys(beginnings))
    if count > len(beginnings):
        raise AdaDecodeError(
            f"--num-prompts {count}: the workload prose has only {len(beginnings)}; "
            "ask for fewer"
        )
    return Random(seed).sample(beginnings, count)
