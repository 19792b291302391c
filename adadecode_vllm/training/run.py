# SPDX-License-Identifier: Apache-2.0
"""One training run, from a model and text to a heads directory."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.evaluation.measure import fit_calibration, measure
from adadecode_vllm.files import write_whole
from adadecode_vllm.heads.config import (
    CONFIG_FILE,
    ExitCalibration,
    ExitHeadsConfig,
    exit_layers_problem,
)
from adadecode_vllm.heads.fingerprint import lm_head_fingerprint
from adadecode_vllm.heads.hub import save_pretrained
from adadecode_vllm.provenance import git_commit, package_versions
from adadecode_vllm.training.cache import (
    LiveStates,
    StateSource,
    cache_bytes,
    cached_states,
)
from adadecode_vllm.training.draft_vocabulary import count_tokens, rank_tokens
from adadecode_vllm.training.probe import Choice, choose_exits
from adadecode_vllm.training.settings import TrainSettings
from adadecode_vllm.training.teacher import Teacher
from adadecode_vllm.training.texts import (
    Text,
    load_texts,
    model_fingerprint,
    split_held_out,
    texts_fingerprint,
)
from adadecode_vllm.training.trainer import Trainer

logger = logging.getLogger(__name__)

RUN_DIRECTORY = "run"
HISTORY_FILE = "history.json"
RUN_FILE = "run.yaml"
FULL_HEADS_FILE = "full_heads.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_PACKAGES = ("adadecode-vllm", "torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class RunOptions:
    """Where a run reads and writes, and how it works; no influence on the weights.

    Attributes:
        output: The heads directory; run files go to its ``run/``.
        cache: Whether to keep states on disk.
        cache_directory: Where; None for ``run/cache``, which is deleted at the end.
        overwrite: Start again where heads or an unfinished run are.
        threshold: The gate that ``auto`` exits are chosen for.
        max_early_predictions: The cap that they are chosen for.
    """

    output: Path
    cache: bool = True
    cache_directory: Path | None = None
    overwrite: bool = False
    threshold: float = 0.75
    max_early_predictions: int = 5


@dataclass
class Reporter:
    """What a run tells while it works; the defaults say nothing.

    Attributes:
        say: Called with sentences.
        choices: Called with the table behind automatic exit layers.
        states: Called with the number of states computed since the last call.
        steps: Called with the number of all steps before the first.
        step: Called with each step's record.
        epoch: Called with each epoch's held-out record.
    """

    say: Callable[[str], None] = lambda sentence: None
    choices: Callable[[list[Choice]], None] = lambda choices: None
    states: Callable[[int], None] = lambda count: None
    steps: Callable[[int], None] = lambda count: None
    step: Callable[[dict[str, Any]], None] = lambda record: None
    epoch: Callable[[dict[str, Any]], None] = lambda record: None


def train_heads(
    teacher: Teacher,
    data: Sequence[Path],
    exit_layers: Sequence[int] | None,
    settings: TrainSettings,
    options: RunOptions,
    processes: Any,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train, calibrate and write heads.

    Args:
        teacher: The frozen model.
        data: Data directories.
        exit_layers: Layer counts of the exits; None to choose them.
        settings: What decides the weights.
        options: Where and how.
        processes: accelerate's ``Accelerator``.
        reporter: Told what happens.

    Returns:
        Contents of ``run.yaml``.

    Raises:
        AdaDecodeError: If something of the user's cannot be used.
    """
    started = time.perf_counter()
    run_directory = options.output / RUN_DIRECTORY
    if processes.is_main_process:
        _prepare_output(options, run_directory)
    processes.wait_for_everyone()

    texts = load_texts(data, teacher, settings.max_length)
    training, held_out = split_held_out(texts, settings.held_out, settings.seed)
    reporter.say(
        f"{len(training)} texts to train on with {_used(training)} tokens to predict, "
        f"{len(held_out)} held out with {_used(held_out)}"
    )
    if exit_layers is None:
        choices = choose_exits(
            teacher,
            training,
            held_out,
            threshold=options.threshold,
            max_early_predictions=options.max_early_predictions,
            pass_tokens=settings.pass_tokens,
        )
        reporter.choices(choices)
        exit_layers = choices[0].exit_layers
    if problem := exit_layers_problem(list(exit_layers), teacher.num_layers):
        raise AdaDecodeError(f"--exit-layers {problem}; give increasing layer counts")

    weights_key = model_fingerprint(teacher)
    data_key = texts_fingerprint(texts)
    layers = [*exit_layers, teacher.num_layers]
    with _sources(
        teacher, [training, held_out], layers, weights_key, settings, options,
        processes, reporter,
    ) as (training_states, held_out_states):  # fmt: skip
        prepared = time.perf_counter()
        trainer = Trainer(
            exit_layers,
            teacher.lm_head,
            training_states,
            held_out_states if held_out else None,
            settings,
            processes,
        )
        key = settings.digest(weights_key, data_key, repr(list(exit_layers)))
        checkpoint = run_directory / _CHECKPOINT
        if checkpoint.exists():
            trainer.load_checkpoint(checkpoint, key)
            reporter.say(f"Continuing after epoch {trainer.progress.epoch}")
        reporter.steps(trainer.total_steps - trainer.progress.step)
        weights = trainer.run(
            checkpoint=lambda: trainer.save_checkpoint(checkpoint, key),
            on_step=reporter.step,
            on_epoch=reporter.epoch,
        )
        trained = time.perf_counter()
        calibration = None
        if held_out:
            calibration = _calibrate(teacher, weights, held_out_states, settings)
    record = {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(_PACKAGES),
        "python": platform.python_version(),
        "model": teacher.name,
        "model_fingerprint": weights_key,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "device": str(teacher.device),
        "processes": processes.num_processes,
        "data": [str(directory) for directory in data],
        "data_fingerprint": data_key,
        "sources": sorted({text.source for text in texts}),
        "texts": {"training": len(training), "held_out": len(held_out)},
        "tokens": {"training": _used(training), "held_out": _used(held_out)},
        "exit_layers": list(exit_layers),
        "settings": settings.model_dump(),
        "epochs_run": trainer.progress.epoch,
        "best_epoch": trainer.progress.best_epoch or None,
        "held_out": _record_of(trainer, trainer.progress.best_epoch),
        "calibration": calibration,
        "seconds": {
            "states": round(prepared - started, 1),
            "training": round(trained - prepared, 1),
        },
    }
    if processes.is_main_process:
        _write_outputs(
            teacher, weights, trainer, training, record, options.output, checkpoint
        )
    processes.wait_for_everyone()
    return record


def _prepare_output(options: RunOptions, run_directory: Path) -> None:
    finished = options.output / CONFIG_FILE
    if options.overwrite:
        finished.unlink(missing_ok=True)
        shutil.rmtree(run_directory, ignore_errors=True)
    elif finished.exists():
        raise AdaDecodeError(
            f"OUT {options.output}: it already holds heads; give another directory, or "
            "pass --overwrite to train them anew"
        )
    run_directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def _sources(
    teacher: Teacher,
    texts: Sequence[list[Text]],
    layers: list[int],
    weights_key: str,
    settings: TrainSettings,
    options: RunOptions,
    processes: Any,
    reporter: Reporter,
) -> Iterator[list[StateSource]]:
    """States of several lists of texts, from the cache or computed when asked for."""
    live = [LiveStates(teacher, part, layers, settings.pass_tokens) for part in texts]
    if not options.cache:
        yield list(live)
        return
    own = options.cache_directory is None
    root = options.cache_directory or options.output / RUN_DIRECTORY / "cache"
    size = sum(cache_bytes(teacher, part, layers) for part in texts)
    reporter.say(f"States of {len(layers)} layers: {_size(size)} in {root}")
    names = ("training", "held_out")
    sources: list[StateSource] = []
    # The main process writes, the others then open what it wrote.
    with processes.main_process_first():
        for name, source in zip(names, live, strict=True):
            sources.append(
                cached_states(
                    root / name, teacher, weights_key, source, reporter.states
                )
            )
    yield sources
    processes.wait_for_everyone()
    if own and processes.is_main_process:
        shutil.rmtree(root)


def _calibrate(
    teacher: Teacher,
    weights: dict[int, torch.Tensor],
    source: StateSource,
    settings: TrainSettings,
) -> dict[str, dict[str, float]]:
    found = measure(
        weights, source, teacher.lm_head, chunk_tokens=settings.chunk_tokens
    )
    table = {}
    for layer, exit_measure in found.items():
        slope, intercept, likelihoods = fit_calibration(exit_measure)
        table[str(layer)] = {
            "slope": slope,
            "intercept": intercept,
            "tokens": len(exit_measure.agreed),
            **likelihoods,
        }
    return table


def _write_outputs(
    teacher: Teacher,
    weights: dict[int, torch.Tensor],
    trainer: Trainer,
    training: Sequence[Text],
    record: dict[str, Any],
    output: Path,
    checkpoint: Path,
) -> None:
    import yaml

    run_directory = output / RUN_DIRECTORY
    history = json.dumps(trainer.progress.history, indent=1) + "\n"
    write_whole(run_directory / HISTORY_FILE, history.encode())
    write_whole(
        run_directory / RUN_FILE, yaml.safe_dump(record, sort_keys=False).encode()
    )
    if trainer.settings.head == "full":
        tensors = {f"exit_heads.{k}.weight": v.cpu() for k, v in weights.items()}
        save_file(tensors, run_directory / FULL_HEADS_FILE)
    else:
        counts = count_tokens((text.answer for text in training), teacher.vocab_size)
        save_pretrained(
            output,
            weights,
            heads_config(teacher, record),
            draft_token_ids=rank_tokens(counts),
            architectures=teacher.model.config.architectures or (),
            training=record,
        )
    checkpoint.unlink(missing_ok=True)


def heads_config(teacher: Teacher, record: dict[str, Any]) -> ExitHeadsConfig:
    """The heads' ``config.json``.

    Args:
        teacher: The model.
        record: Of the run, with ``exit_layers`` and ``calibration``.

    Returns:
        The configuration.
    """
    calibration = record["calibration"]
    return ExitHeadsConfig(
        exit_layers=record["exit_layers"],
        hidden_size=teacher.hidden_size,
        vocab_size=teacher.vocab_size,
        num_hidden_layers=teacher.num_layers,
        base_model=teacher.name,
        lm_head_fingerprint=lm_head_fingerprint(teacher.lm_head),
        calibration=calibration
        and {
            layer: ExitCalibration(
                slope=row["slope"], intercept=row["intercept"], tokens=row["tokens"]
            )
            for layer, row in calibration.items()
        },
    )


def _record_of(trainer: Trainer, epoch: int) -> dict[str, Any] | None:
    records = trainer.progress.history["held_out"]
    return next((record for record in records if record["epoch"] == epoch), None)


def _used(texts: Sequence[Text]) -> int:
    return sum(text.used for text in texts)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
