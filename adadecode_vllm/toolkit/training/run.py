# SPDX-License-Identifier: Apache-2.0
"""One training run, from a model and text to a heads directory."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import atomic_write, writing
from adadecode_vllm.heads.io import HeadsTensors, save_tensors
from adadecode_vllm.toolkit.provenance import git_commit, package_versions
from adadecode_vllm.toolkit.publishing.save import save_pretrained
from adadecode_vllm.toolkit.states.cache import (
    LiveStates,
    StateSource,
    cache_bytes,
    cached_states,
)
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import (
    Text,
    used_tokens,
)
from adadecode_vllm.toolkit.training.description import (
    Findings,
    examine,
    heads_config,
)
from adadecode_vllm.toolkit.training.options import Reporter, RunOptions
from adadecode_vllm.toolkit.training.output import (
    CACHE_DIRECTORY,
    CHECKPOINT_FILE,
    FULL_HEADS_FILE,
    HISTORY_FILE,
    RUN_FILE,
    alone,
    begin,
    check_training_output,
    choose_run_directory,
    finish,
)
from adadecode_vllm.toolkit.training.ridge import ridge_heads
from adadecode_vllm.toolkit.training.settings import TrainSettings
from adadecode_vllm.toolkit.training.task import Task, read_task
from adadecode_vllm.toolkit.training.together import all_or_none, in_main, main_first
from adadecode_vllm.toolkit.training.trainer import Trainer

_PACKAGES = ("adadecode-vllm", "torch", "transformers", "accelerate", "safetensors")


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
        AdaDecodeError: If something of the user's cannot be used, or another run is
            writing to the same directory.
    """
    started = time.perf_counter()
    task = read_task(teacher, data, exit_layers, settings, options, processes, reporter)
    with _alone(options.output, processes):
        return _train(
            teacher, data, task, settings, options, processes, reporter, started
        )


@contextmanager
def _alone(output: Path, processes: Any) -> Iterator[None]:
    """Let no other run write to OUT meanwhile; the main process holds the lock."""
    with ExitStack() as held:
        lock = alone(output)
        in_main(processes, lambda: _to_disk(output, lambda: held.enter_context(lock)))
        yield


def _train(
    teacher: Teacher,
    data: Sequence[Path],
    task: Task,
    settings: TrainSettings,
    options: RunOptions,
    processes: Any,
    reporter: Reporter,
    started: float,
) -> dict[str, Any]:
    """Train on what was read, and write."""

    def check() -> None:
        check_training_output(options.output, overwrite=options.overwrite)

    all_or_none(processes, check)  # another run may have ended there meanwhile
    directory = all_or_none(
        processes,
        lambda: choose_run_directory(
            options.output, task.key, overwrite=options.overwrite
        ),
    )
    in_main(
        processes, lambda: _to_disk(options.output, lambda: begin(directory, task.key))
    )
    reporter.begin(directory)
    layers = [*task.exit_layers, teacher.num_layers]
    training_states, held_out_states = _sources(
        teacher, [task.training, task.held_out], layers, task.weights_key, settings,
        options, directory, processes, reporter,
    )  # fmt: skip
    prepared = time.perf_counter()
    lm_head = teacher.lm_head
    if settings.draft_vocabulary is not None:
        lm_head = lm_head[task.draft_token_ids.to(lm_head.device)]
        share = task.counts[task.draft_token_ids].sum() / task.counts.sum()
        reporter.say(
            f"Trained on {len(task.draft_token_ids):,} of {teacher.vocab_size:,} "
            f"tokens, {share:.1%} of the text"
        )
    checkpoint = directory / CHECKPOINT_FILE
    resumed = all_or_none(processes, checkpoint.exists)
    start = None
    if settings.start == "ridge" and not resumed:
        start = all_or_none(
            processes,
            lambda: ridge_heads(
                training_states, task.exit_layers, memory=settings.memory
            ),
        )
    trainer = Trainer(
        task.exit_layers,
        lm_head,
        training_states,
        held_out_states if task.held_out else None,
        settings,
        processes,
        start,
    )
    if resumed:
        all_or_none(processes, lambda: trainer.load_checkpoint(checkpoint, task.key))
        reporter.say(f"Continuing after epoch {trainer.progress.epoch}")
    reporter.start("training", "steps", trainer.total_steps - trainer.progress.step)

    def save_checkpoint() -> None:
        _to_disk(options.output, lambda: trainer.save_checkpoint(checkpoint, task.key))

    def step(record: dict[str, Any]) -> None:
        reporter.step(record)
        reporter.advance(1)

    weights, memory = trainer.run(
        checkpoint=lambda: in_main(processes, save_checkpoint),
        on_step=step,
        on_epoch=reporter.epoch,
    )
    trained = time.perf_counter()
    findings = Findings()
    if task.held_out:
        reporter.start("calibrating", "texts", len(task.held_out))
        findings = all_or_none(
            processes,
            lambda: examine(
                teacher,
                HeadsTensors(
                    weights, memory, task.draft_token_ids if task.shortened else None
                ),
                held_out_states,
                settings,
                options.max_early_predictions,
                reporter.advance,
            ),
        )
        if findings.recommendation is not None:
            reporter.say(findings.recommendation.sentence)
    record = {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(_PACKAGES),
        "python": platform.python_version(),
        "model": teacher.name,
        "model_fingerprint": task.weights_key,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "device": str(teacher.device),
        "processes": processes.num_processes,
        "data": [str(directory) for directory in data],
        "data_fingerprint": task.data_key,
        "sources": sorted({text.source for text in [*task.training, *task.held_out]}),
        "texts": {"training": len(task.training), "held_out": len(task.held_out)},
        "tokens": {
            "training": used_tokens(task.training),
            "held_out": used_tokens(task.held_out),
        },
        "exit_layers": task.exit_layers,
        "settings": settings.model_dump(),
        "epochs_run": trainer.progress.epoch,
        "best_epoch": trainer.progress.best_epoch or None,
        "held_out": _record_of(trainer, trainer.progress.best_epoch),
        "calibration": findings.calibration,
        "recommended": findings.recommended,
        "seconds": {
            "states": round(prepared - started, 1),
            "training": round(trained - prepared, 1),
        },
    }

    def write() -> None:
        _write_outputs(
            teacher,
            weights,
            memory,
            task.draft_token_ids,
            trainer,
            record,
            options,
            directory,
        )

    in_main(processes, lambda: _to_disk(options.output, write))
    return record


def _to_disk(output: Path, write: Callable[[], None]) -> None:
    """Let a failure to write be a sentence."""
    try:
        write()
    except OSError as error:
        raise AdaDecodeError(
            f"OUT {output}: writing failed ({error.strerror or error}); make room or "
            "mend the directory and run the command again; it goes on after its last "
            "whole epoch"
        ) from error


def _sources(
    teacher: Teacher,
    texts: Sequence[list[Text]],
    layers: list[int],
    weights_key: str,
    settings: TrainSettings,
    options: RunOptions,
    directory: Path,
    processes: Any,
    reporter: Reporter,
) -> list[StateSource]:
    """States of several lists of texts, from the cache or computed when asked for."""
    live = [LiveStates(teacher, part, layers, settings.pass_tokens) for part in texts]
    if not options.cache:
        return list(live)
    own = options.cache_directory is None
    root = options.cache_directory or directory / CACHE_DIRECTORY
    size = sum(cache_bytes(teacher, part, layers) for part in texts)
    reporter.say(f"States of {len(layers)} layers: {_size(size)} in {root}")
    reporter.start("states", "tokens", sum(map(used_tokens, texts)))

    def open_cache() -> list[StateSource]:
        return [
            cached_states(root, teacher, weights_key, source, reporter.advance, own=own)
            for source in live
        ]

    # The main process writes, the others then open what it wrote.
    return main_first(processes, open_cache)


def _write_outputs(
    teacher: Teacher,
    weights: dict[int, torch.Tensor],
    memory: dict[int, torch.Tensor] | None,
    draft_token_ids: torch.Tensor,
    trainer: Trainer,
    record: dict[str, Any],
    options: RunOptions,
    directory: Path,
) -> None:
    """Write all that was made, then let it take the place of what is in OUT."""
    import yaml

    history = json.dumps(trainer.progress.history, indent=1) + "\n"
    atomic_write(directory / HISTORY_FILE, history.encode())
    atomic_write(directory / RUN_FILE, yaml.safe_dump(record, sort_keys=False).encode())
    if trainer.settings.head == "full":
        tensors = {f"exit_heads.{k}.weight": v.cpu() for k, v in weights.items()}
        with writing(directory / FULL_HEADS_FILE) as temporary:
            save_tensors(temporary, tensors)
    else:
        save_pretrained(
            options.output,
            weights,
            heads_config(teacher, record, options.heads_dtype),
            draft_token_ids=draft_token_ids,
            memory=memory,
            architectures=teacher.model.config.architectures or (),
            training=record,
        )
    finish(options.output, directory)


def _record_of(trainer: Trainer, epoch: int) -> dict[str, Any] | None:
    records = trainer.progress.history["held_out"]
    return next((record for record in records if record["epoch"] == epoch), None)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
