# SPDX-License-Identifier: Apache-2.0
"""The main job on the shipped model: the same text as ordinary vLLM, and its speed.

Generates from held-out problems and from prompts cut from held-out source files, with
ordinary vLLM and with AdaDecode, one request at a time and in float32. Checks that the
texts are identical. Both run without compilation, which would take minutes; --compile
runs both at vLLM's defaults.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parents[1]))

from benchmarks.analysis import tokens_per_forward, tokens_per_s  # noqa: E402
from benchmarks.arms import Arm, EngineSettings  # noqa: E402
from benchmarks.process import ArmProcess  # noqa: E402
from benchmarks.workloads import load_workload  # noqa: E402


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind")] = 6,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    threshold: Annotated[float, typer.Option(min=0, max=1)] = 0.75,
    max_early_predictions: Annotated[int, typer.Option(min=1)] = 5,
    compile: Annotated[
        bool, typer.Option("--compile", help="As vLLM does by default; takes minutes")
    ] = False,
) -> None:
    """Run both, compare the texts and print a table."""
    console = Console()
    workloads = {
        name: load_workload(name, DEMO / "model", count=prompts).prompts
        for name in ("problems", "code")
    }
    settings = EngineSettings(
        model=str(DEMO / "model"),
        heads=str(DEMO / "heads"),
        dtype="float32",
        threshold=threshold,
        max_early_predictions=max_early_predictions,
        arguments={"enforce_eager": not compile},
    )
    generation: dict[str, Any] = {"batch_size": 1, "ignore_eos": False}
    with ExitStack() as stack:
        arms = {}
        for arm in ("ordinary", "adadecode"):
            with console.status(f"{arm}: starting vLLM"):
                arms[arm] = stack.enter_context(ArmProcess(Arm(arm, arm), settings))
            arms[arm].generate(
                workloads["problems"][:1], output_tokens=16, **generation
            )
        # In turn, prompts of one kind after the other, so that a machine whose speed
        # drifts slows both alike.
        with console.status("generating"):
            results: dict[str, Any] = {
                workload: {
                    arm: process.generate(
                        token_ids, output_tokens=output_tokens, **generation
                    )
                    for arm, process in arms.items()
                }
                for workload, token_ids in workloads.items()
            }
    console.print(_table(results))
    different = [
        f"{workload} prompt {index}"
        for workload, by_arm in results.items()
        for index, (expected, text) in enumerate(
            zip(
                by_arm["ordinary"]["token_ids"],
                by_arm["adadecode"]["token_ids"],
                strict=True,
            )
        )
        if expected != text
    ]
    if different:
        console.print(f"[red]Texts differ: {', '.join(different)}[/red]")
        raise typer.Exit(1)
    console.print(f"All {2 * prompts} texts are identical.")


def _table(results: dict[str, Any]) -> Table:
    table = Table(title="One request at a time, float32, greedy", padding=(0, 0, 0, 1))
    columns = (
        "text",
        "vLLM\ntok/s",
        "AdaDecode\ntok/s",
        "\nratio",
        "tokens/\nforward",
        "early\nby exit",
        "share of\ntokens",
        "\naccepted",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "text" else "right")
    for workload, by_arm in results.items():
        ordinary, ours = by_arm["ordinary"], by_arm["adadecode"]
        stats = ours["stats"]
        predicted = stats["early_predictions"]
        accepted, rejected = sum(stats["accepted"]), sum(stats["rejected"])
        by_exit = "\n".join(
            f"{layer}: {count}"
            for layer, count in zip(stats["exit_layers"], predicted, strict=True)
        )
        table.add_row(
            workload,
            f"{tokens_per_s(ordinary):.0f}",
            f"{tokens_per_s(ours):.0f}",
            f"{tokens_per_s(ours) / tokens_per_s(ordinary):.2f}x",
            f"{tokens_per_forward(ours):.2f}",
            by_exit,
            f"{accepted / max(1, stats['generated_tokens']):.0%}",
            f"{accepted / max(1, accepted + rejected):.1%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
