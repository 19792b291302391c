# SPDX-License-Identifier: Apache-2.0
"""`adadecode eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.remote_code import TrustRemoteCode
from adadecode_vllm.toolkit.progress import Meter


def eval_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The base model: a directory or a Hugging Face name."
        ),
    ],
    heads: Annotated[Path, typer.Argument(metavar="HEADS", help="A heads directory.")],
    data: Annotated[
        list[Path],
        typer.Option(help="A directory of `adadecode data` with held-out text."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Where the report goes. Default: HEADS/evaluation."),
    ] = None,
    gate: Annotated[
        str, typer.Option(help="Gate to simulate: probability or acceptance.")
    ] = "probability",
    answers: Annotated[
        int, typer.Option(min=0, help="Answers to simulate at most; 0: none.")
    ] = 200,
    overhead: Annotated[
        float, typer.Option(min=0, help="A draft's overhead, in plain steps.")
    ] = 0.0,
    last_guess: Annotated[
        bool,
        typer.Option(
            "--last-guess/--no-last-guess",
            help="Submit unsure guesses of the last exit where they pay.",
        ),
    ] = True,
    row_costs: Annotated[
        str,
        typer.Option(
            help="Cost of a pass by its rows: measured on this device, free, or such "
            "as 1:1,6:1.6."
        ),
    ] = "measured",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens after which a text is cut.")
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens whose distributions are in memory.")
    ] = 512,
    pass_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in one pass of the model.")
    ] = 1024,
    dtype: Annotated[
        str, typer.Option(help="The model's: auto (bfloat16 on GPU, float32 on CPU).")
    ] = "auto",
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw PNGs and an HTML report.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tell from held-out text what heads will do when served."""
    import torch
    import yaml

    from adadecode_vllm.heads import load_heads_config
    from adadecode_vllm.heads.files import heads_named, weights_digest
    from adadecode_vllm.toolkit.evaluation.output import (
        check_evaluation_output,
        write_evaluation,
    )
    from adadecode_vllm.toolkit.evaluation.row_costs import RowCosts
    from adadecode_vllm.toolkit.evaluation.run import SimulationGrid, evaluate_heads
    from adadecode_vllm.toolkit.publishing.card import write_card
    from adadecode_vllm.toolkit.states.teacher import Teacher, resolve_dtype

    if gate not in ("probability", "acceptance"):
        raise AdaDecodeError(
            f"--gate {gate}: unknown; choose probability or acceptance"
        )
    if not math.isfinite(overhead):
        raise AdaDecodeError(f"--overhead {overhead}: give a number of plain steps")
    rows = None if row_costs == "measured" else RowCosts.parse(row_costs)
    # What can be refused is refused before the model's minutes.
    output = output or heads / "evaluation"
    check_evaluation_output(output, plots=plots)
    with heads_named("HEADS"):
        config = load_heads_config(heads)
    if answers and gate == "acceptance" and config.calibration is None:
        raise AdaDecodeError(
            f"--gate acceptance: the heads are not calibrated ({heads}); train them "
            "with `adadecode train` and a held-out share, or give --gate probability"
        )
    history = _read(heads / "run" / "history.json", json.loads)
    training = _read(heads / "run" / "run.yaml", yaml.safe_load)
    if plots:
        from adadecode_vllm.toolkit.report import parse_history, write_report
        from adadecode_vllm.toolkit.report.plots import require_plots

        require_plots()
        if history is not None:
            parse_history(history)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Teacher.load(
        model,
        resolve_dtype(dtype, device),
        device,
        trust_remote_code=trust_remote_code,
    )
    grid = SimulationGrid(
        gate=gate,
        most_answers=answers,
        overhead=overhead,
        last_guess=last_guess,
        row_costs=rows,
        requests=batch_size,
    )
    with Meter() as meter, heads_named("HEADS"):
        report = evaluate_heads(
            teacher,
            heads,
            data,
            grid=grid if answers else None,
            max_length=max_length,
            pass_tokens=pass_tokens,
            chunk_tokens=chunk_tokens,
            meter=meter,
        )
    with heads_named("HEADS"):
        weights = weights_digest(heads)
        if load_heads_config(heads) != config or weights != report["weights"]:
            raise AdaDecodeError(
                f"HEADS {heads}: they were replaced while they were evaluated, so "
                "nothing was written; evaluate them again"
            )
    written = [write_evaluation(output, report)]
    if plots:
        written += write_report(output, report, history)
    _print(report)
    written.append(write_card(heads, config, training=training, evaluation=report))
    typer.echo(f"Wrote {', '.join(str(path) for path in written)}")


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """A file of the training; None where there is none."""
    from yaml import YAMLError

    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        raise AdaDecodeError(
            f"HEADS {path.parent.parent}: {path.parent.name}/{path.name} cannot be "
            f"read ({first_line(error)}); restore it, or move it away to do without"
        ) from error


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from adadecode_vllm.toolkit.report import parse_evaluation
    from adadecode_vllm.toolkit.report.defaults import defaults_in_words
    from adadecode_vllm.toolkit.report.text import conditions

    console = Console()
    table = Table(title=f"{report['tokens']} tokens of {report['data']}")
    columns = ("exit", "agreement", "KL (nats)", "coverage", "precision", "ECE")
    for column in columns:
        table.add_column(column, justify="right")
    for row in report["exits"]:
        at = next(entry for entry in row["thresholds"] if entry["threshold"] == 0.75)
        precision = at["precision"]
        by_draft = row.get("agreement_by_draft", [row["agreement"]])
        table.add_row(
            str(row["layer"]),
            " / ".join(f"{share:.1%}" for share in by_draft),
            f"{row['kl']:.4f}",
            f"{at['coverage']:.1%}",
            "-" if precision is None else f"{precision:.1%}",
            f"{row['reliability']['probability']['ece']:.3f}",
        )
    table.caption = "coverage and precision at threshold 0.75"
    console.print(table)
    simulation, best = report["simulation"], report["best"]
    if simulation is None:
        console.print("Nothing simulated: no answers in the data, or --answers 0.")
        return
    table = Table(
        title=f"Predicted speedup, {simulation['answers']} answers, gate: "
        f"{simulation['gate']}"
    )
    table.add_column("threshold", justify="right")
    for cap in simulation["caps"]:
        table.add_column(f"cap {cap}", justify="right")
    for threshold, row in zip(
        simulation["thresholds"], simulation["speedup"], strict=True
    ):
        table.add_row(f"{threshold:g}", *(f"{value:.2f}x" for value in row))
    table.caption = conditions(simulation["requests"], simulation["row_costs"])
    console.print(table)
    console.print(
        f"Best: threshold {best['threshold']:g}, cap {best['cap']}: "
        f"{best['speedup']:.2f}x"
    )
    expected = defaults_in_words(parse_evaluation(report).defaults)
    console.print(
        " ".join(expected)
        or "vLLM is not installed: the engine's defaults were not played."
    )
