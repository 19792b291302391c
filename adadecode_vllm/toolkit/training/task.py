# SPDX-License-Identifier: Apache-2.0
"""What a training run reads and decides before it writes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.config import (
    default_draft_vocabulary,
    exit_layers_problem,
)
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import (
    Text,
    load_texts,
    model_fingerprint,
    split_held_out,
    texts_fingerprint,
    used_tokens,
)
from adadecode_vllm.toolkit.training.draft_vocabulary import (
    MAX_TOKENS,
    count_tokens,
    rank_tokens,
)
from adadecode_vllm.toolkit.training.options import Reporter, RunOptions
from adadecode_vllm.toolkit.training.output import check_training_output
from adadecode_vllm.toolkit.training.probe import choose_exits
from adadecode_vllm.toolkit.training.settings import TrainSettings
from adadecode_vllm.toolkit.training.together import all_or_none


@dataclass(frozen=True)
class Task:
    """What was read and decided before anything is written.

    Attributes:
        training: Texts to train on.
        held_out: Texts to examine the heads on.
        counts: (V,) how often the answers hold each token.
        draft_token_ids: The tokens that heads are trained on, the most frequent first.
        shortened: Whether gates look at these tokens only.
        exit_layers: Layer counts of the exits.
        weights_key: Of the model.
        data_key: Of all texts.
        key: What the weights depend on.
    """

    training: list[Text]
    held_out: list[Text]
    counts: torch.Tensor
    draft_token_ids: torch.Tensor
    shortened: bool
    exit_layers: list[int]
    weights_key: str
    data_key: str
    key: str


def read_task(
    teacher: Teacher,
    data: Sequence[Path],
    exit_layers: Sequence[int] | None,
    settings: TrainSettings,
    options: RunOptions,
    processes: Any,
    reporter: Reporter,
) -> Task:
    """Read the data and choose the exits; nothing is written.

    Args:
        teacher: The frozen model.
        data: Data directories.
        exit_layers: Layer counts of the exits; None to choose them.
        settings: What decides the weights.
        options: Where and how.
        processes: accelerate's ``Accelerator``.
        reporter: Told what happens.

    Raises:
        AdaDecodeError: If something of the user's cannot be used.
    """

    def read() -> list[Text]:
        check_training_output(options.output, overwrite=options.overwrite)
        return load_texts(data, teacher, settings.max_length)

    texts = all_or_none(processes, read)
    training, held_out = split_held_out(texts, settings.held_out, settings.seed)
    reporter.say(
        f"{len(training)} texts to train on with {used_tokens(training)} tokens to "
        f"predict, {len(held_out)} held out with {used_tokens(held_out)}"
    )
    counts = count_tokens((text.answer for text in training), teacher.vocab_size)
    draft_token_ids = rank_tokens(counts, settings.draft_vocabulary or MAX_TOKENS)
    shortened = default_draft_vocabulary(len(draft_token_ids), teacher.vocab_size) > 0
    if exit_layers is None:
        choices = all_or_none(
            processes,
            lambda: choose_exits(
                teacher,
                training,
                held_out,
                threshold=options.threshold,
                max_draft_tokens=options.max_early_predictions,
                drafts=settings.unroll if settings.memory else 0,
                draft_token_ids=draft_token_ids if shortened else None,
                pass_tokens=settings.pass_tokens,
                start=lambda total: reporter.start("choosing exits", "sets", total),
                advance=reporter.advance,
            ),
        )
        reporter.choices(choices)
        exit_layers = choices[0].exit_layers
    layers = list(exit_layers)
    if problem := exit_layers_problem(layers, teacher.num_layers):
        raise AdaDecodeError(f"--exit-layers {problem}; give increasing layer counts")
    weights_key = model_fingerprint(teacher)
    data_key = texts_fingerprint(texts)
    return Task(
        training=training,
        held_out=held_out,
        counts=counts,
        draft_token_ids=draft_token_ids,
        shortened=shortened,
        exit_layers=layers,
        weights_key=weights_key,
        data_key=data_key,
        key=settings.digest(weights_key, data_key, repr(layers), str(teacher.dtype)),
    )
