# SPDX-License-Identifier: Apache-2.0
"""`adadecode train`."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adadecode_vllm.config import DEFAULT_CAP, AdaDecodeConfig, validated
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.config import parse_heads_dtype
from adadecode_vllm.remote_code import TrustRemoteCode
from adadecode_vllm.toolkit.progress import Meter

if TYPE_CHECKING:
    from adadecode_vllm.toolkit.training.options import Reporter
    from adadecode_vllm.toolkit.training.settings import TrainSettings


def train_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The base model: a directory or a Hugging Face name."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The heads directory to write.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="A directory of `adadecode data`; again for more domains."),
    ],
    exit_layers: Annotated[
        str,
        typer.Option(metavar="LAYERS", help="Layer counts such as 8,16,24, or auto."),
    ] = "auto",
    preset: Annotated[
        str,
        typer.Option(
            help="paper (100 epochs), quick (10 epochs) or best (quick, with memory "
            "and from least squares)."
        ),
    ] = "paper",
    objective: Annotated[
        str | None, typer.Option(help="kl (the paper's) or greedy.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="transform, or full: full-size heads, for comparison only."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="identity (T = I, the paper's) or ridge (least squares)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the text.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts in a batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's peak.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the texts that is not trained on.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without progress to stop after; 0: never")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of order and held-out share.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut.")
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Train on so many of the most frequent tokens only, by default on "
            "all; up to half of all, gates look at no others either."
        ),
    ] = None,
    memory: Annotated[
        bool | None,
        typer.Option(
            "--memory/--no-memory",
            help="Let heads also read the state of the token before.",
        ),
    ] = None,
    unroll: Annotated[
        int | None,
        typer.Option(help="Drafts of a cycle that heads with memory are trained on."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens whose distributions are in memory.")
    ] = None,
    pass_tokens: Annotated[
        int | None, typer.Option(help="Tokens in one pass of the model.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The model's: auto (bfloat16 on GPU, float32 on CPU).")
    ] = "auto",
    heads_dtype: Annotated[
        str, typer.Option(help="The heads': float32, bfloat16 or float16.")
    ] = "float32",
    attn: Annotated[str, typer.Option(help="sdpa, or xformers on CUDA.")] = "sdpa",
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the states on disk.")
    ] = True,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where; kept for later runs. Default: OUT/run.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Gate that automatic exits are chosen for.")
    ] = 0.75,
    max_early_predictions: Annotated[
        int, typer.Option(help="Cap that automatic exits are chosen for.")
    ] = DEFAULT_CAP,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace heads in OUT, once the new ones are trained.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train exit heads for a frozen model; an interrupted run is continued."""
    from adadecode_vllm.toolkit.options import parse_layers

    layers = None if exit_layers == "auto" else parse_layers(exit_layers)
    stored_dtype = parse_heads_dtype("--heads-dtype", heads_dtype)
    _check_cache(cache_dir, output)
    _check_policy(threshold=threshold, max_early_predictions=max_early_predictions)
    settings = _settings(
        preset,
        objective=objective,
        head=head,
        start=start,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        held_out=held_out,
        patience=patience,
        seed=seed,
        max_length=max_length,
        draft_vocabulary=draft_vocabulary,
        memory=memory,
        unroll=unroll,
        chunk_tokens=chunk_tokens,
        pass_tokens=pass_tokens,
    )
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise AdaDecodeError(
            "adadecode train: accelerate is not installed; install the extra `train`, "
            "as in pip install 'adadecode-vllm[train]'"
        ) from error
    from torch import distributed

    from adadecode_vllm.toolkit.states.teacher import Teacher, resolve_dtype
    from adadecode_vllm.toolkit.training.options import RunOptions
    from adadecode_vllm.toolkit.training.output import check_training_output
    from adadecode_vllm.toolkit.training.run import train_heads
    from adadecode_vllm.toolkit.training.together import all_or_none

    logging.basicConfig(level=logging.WARNING)
    # The others wait while the main process writes states, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    with ExitStack() as stack:
        # Groups that were there before belong to whoever began them, as an engine.
        ours = not distributed.is_initialized()
        processes = Accelerator(kwargs_handlers=[patience])
        if ours:
            stack.callback(processes.end_training)

        def load() -> Teacher:
            # Before the minutes that loading the model takes.
            check_training_output(output, overwrite=overwrite)
            name = resolve_dtype(dtype, processes.device)
            return Teacher.load(
                model, name, processes.device, attn, trust_remote_code=trust_remote_code
            )

        teacher = all_or_none(processes, load)
        options = RunOptions(
            output,
            cache,
            cache_dir,
            overwrite,
            threshold,
            max_early_predictions,
            stored_dtype,
        )
        with _Display(processes.is_main_process) as display:
            record = train_heads(
                teacher, data, layers, settings, options, processes, display.reporter()
            )
        if processes.is_main_process:
            _summarize(record, output)


def _check_cache(cache_dir: Path | None, output: Path) -> None:
    """What is in OUT is replaced or removed when training ends."""
    if cache_dir and cache_dir.resolve().is_relative_to(output.resolve()):
        raise AdaDecodeError(
            f"--cache-dir {cache_dir}: it lies in OUT, {output}, where nothing is kept "
            "for later runs; give a directory outside"
        )


def _check_policy(**options: Any) -> None:
    """Refuse what the engine refuses, by the names that it has here."""

    def sentence(detail: Any) -> str:
        flag = "--" + str(detail["loc"][0]).replace("_", "-")
        message = detail["msg"].lower()
        return f"{flag} {detail['input']}: {message}; correct the value"

    validated(AdaDecodeConfig, {"heads": "to be trained", **options}, sentence, str)


def _settings(preset: str, **given: Any) -> TrainSettings:
    from pydantic import ValidationError

    from adadecode_vllm.toolkit.training.settings import PRESETS, TrainSettings

    if preset not in PRESETS:
        raise AdaDecodeError(
            f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}"
        )
    values = {name: value for name, value in given.items() if value is not None}
    try:
        return TrainSettings(**(PRESETS[preset] | values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise AdaDecodeError(
            f"{flag} {first['input']}: {first['msg'].lower()}; correct the value"
        ) from error


class _Display:
    """Progress on stderr and curves for TensorBoard."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._meter = Meter(enabled)
        self._writer: Any = None

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)
        if self._writer is not None:
            self._writer.close()

    def reporter(self) -> Reporter:
        """What the run calls; says nothing in processes but the main one."""
        from adadecode_vllm.toolkit.training.options import Reporter

        if not self.enabled:
            return Reporter()
        return Reporter(
            say=typer.echo,
            choices=_print_choices,
            begin=self._begin,
            start=self._meter.start,
            advance=self._meter.advance,
            step=self._step,
            epoch=self._epoch,
        )

    def _begin(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            typer.echo("TensorBoard is not installed: no curves are written for it")
        else:
            from adadecode_vllm.toolkit.training.output import CURVES_DIRECTORY

            self._writer = SummaryWriter(str(directory / CURVES_DIRECTORY))

    def _step(self, record: dict[str, Any]) -> None:
        mean = sum(record["loss"].values()) / len(record["loss"])
        self._meter.note = f"epoch {record['epoch']}, loss {mean:.4f}"
        self._write("training", record, record["step"], ("loss",))
        if self._writer is not None:
            self._writer.add_scalar(
                "learning_rate", record["learning_rate"], record["step"]
            )

    def _epoch(self, record: dict[str, Any]) -> None:
        self._write("held_out", record, record["epoch"], ("loss", "agreement"))

    def _write(
        self, kind: str, record: dict[str, Any], at: int, names: tuple[str, ...]
    ) -> None:
        if self._writer is None:
            return
        for name in names:
            for layer, value in record[name].items():
                self._writer.add_scalar(f"{kind}/{name}/exit_{layer}", value, at)


def _print_choices(choices: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Exit layers, by predicted speedup (least-squares heads)")
    for column in ("exits", "speedup", "tokens/forward", "accepted", "coverage"):
        table.add_column(column, justify="right")
    best_of_size: dict[int, Any] = {}
    for choice in choices:
        best_of_size.setdefault(len(choice.exit_layers), choice)
    listed = [*choices[:8], *(c for c in best_of_size.values() if c not in choices[:8])]
    for choice in listed:
        table.add_row(
            ",".join(map(str, choice.exit_layers)),
            f"{choice.speedup:.2f}x",
            f"{choice.tokens_per_forward:.2f}",
            f"{choice.acceptance:.1%}",
            f"{choice.coverage:.1%}",
        )
    Console().print(table)


def _summarize(record: dict[str, Any], output: Path) -> None:
    from adadecode_vllm.toolkit.report.text import among

    held_out = record["held_out"]
    if held_out is not None:
        for layer, agreement in held_out["agreement"].items():
            later = held_out.get("agreement_by_draft", {}).get(layer, [])[1:]
            drafts = f" (next drafts: {', '.join(map('{:.1%}'.format, later))})"
            typer.echo(
                f"exit {layer}: agrees with the final layer"
                f"{among(held_out.get('draft_vocabulary'))} on {agreement:.1%} of the "
                f"held-out tokens{drafts if later else ''}, loss "
                f"{held_out['loss'][layer]:.4f} nats"
            )
    seconds = record["seconds"]
    typer.echo(
        f"Wrote {output} after {record['epochs_run']} epochs ({seconds['states']} s "
        f"for the states, {seconds['training']} s for training)"
    )
