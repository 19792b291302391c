# SPDX-License-Identifier: Apache-2.0
"""The command `adadecode data` and what it shows while it works."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from adadecode_vllm.errors import AdaDecodeError


def data_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Data directory.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Target model: a directory or a Hugging Face name."
        ),
    ],
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            metavar="FILE_OR_DIR",
            help="File or directory: .jsonl, .jsonl.gz, .json, .parquet; with --task "
            "text also .txt, a text a file. May be repeated.",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="xsum, mbpp, humaneval, gsm8k, or text: any other.")
    ] = "text",
    split: Annotated[
        str | None,
        typer.Option(help="train or test; by default the first that the task has."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Rows to take; by default the paper's, or all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows, if not all.")] = 0,
    field: Annotated[
        str | None,
        typer.Option(
            help="With --task text: the field with the text, by default text."
        ),
    ] = None,
    finished: Annotated[
        bool,
        typer.Option(
            "--finished",
            help="Take text, or published answers, as they are; start no engine. Texts "
            "beyond --max-length are cut into pieces.",
        ),
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Ask through the chat template or plainly; by default as the "
            "tokenizer has a template.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer.")
    ] = 512,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Skip prompts of more tokens; by default the model's length less "
            "--max-new-tokens.",
        ),
    ] = None,
    rows_per_shard: Annotated[
        int, typer.Option(min=1, help="Rows of a shard, answered as one batch.")
    ] = 512,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='More vLLM engine arguments: {"max_model_len": 4096}'
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the work with Ray Data.")
    ] = False,
    ray_actors: Annotated[
        int | None, typer.Option(min=1, help="Engines to start, by default 1.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Ray cluster; by default this machine."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again, replacing data in OUT.")
    ] = False,
) -> None:
    """Make training text: the model answers prompts itself, greedily.

    A run that was interrupted continues when the same command is given again.
    """
    if not ray and (ray_actors is not None or ray_address is not None):
        flag = "--ray-actors" if ray_actors is not None else "--ray-address"
        raise AdaDecodeError(f"{flag}: it has no effect without --ray; pass --ray")
    if field is not None and task != "text":
        raise AdaDecodeError(
            f"--field {field}: the fields of {task} are known; drop --field, or pass "
            "--task text"
        )
    engine_options = _parse_engine(engine)

    from adadecode_vllm.data.make import make_data
    from adadecode_vllm.data.options import DataOptions
    from adadecode_vllm.data.tasks import Selection

    display = Display()
    with display:
        info = make_data(
            DataOptions(
                out=out,
                model=model,
                inputs=tuple(inputs),
                selection=Selection(task, split, count, seed, field or "text"),
                finished=finished,
                chat=chat,
                max_new_tokens=max_new_tokens,
                max_length=max_length,
                rows_per_shard=rows_per_shard,
                dtype=dtype,
                engine=engine_options,
                ray_actors=(ray_actors or 1) if ray else None,
                ray_address=ray_address,
                overwrite=overwrite,
                argv=tuple(sys.argv[1:]),
            ),
            display,
        )
    typer.echo(_summary(info, out, display))


class Display:
    """A progress bar with ETA on a terminal, else a line per shard; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.rows = self.tokens = 0
        self.seconds = 0.0
        self._total = self._before = 0
        self._began = float("inf")
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            # Of the last minutes: prompts of a shard finish in bursts.
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=300,
        )
        self._task: Any = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def start(self, rows: int, done: int) -> None:
        """Show `done` of `rows` rows."""
        self._total, self._before = rows, done
        self._task = self._bar.add_task("rows", total=rows, completed=done, rate="")

    def advance(self, rows: int) -> None:
        """Show further rows."""
        # Not earlier: vLLM writes its log while it starts.
        if self._console.is_terminal and not self._bar.live.is_started:
            self._bar.start()
        self._bar.advance(self._task, rows)

    def wrote(self, rows: int, tokens: int, began: float) -> None:
        """Show the speed, counted from when the first engine had started."""
        self.rows += rows
        self.tokens += tokens
        self._began = min(self._began, began)
        self.seconds = time.time() - self._began
        rate = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        self._bar.update(self._task, rate=rate)
        if not self._console.is_terminal:
            done = self._before + self.rows
            left = (self._total - done) * self.seconds / self.rows
            self._console.print(
                f"{done:,} of {self._total:,} rows, {rate}, {left:,.0f} s left",
                highlight=False,
            )


def _summary(info: Any, out: Path, display: Display) -> str:
    """What was done, in two lines at most."""
    tokens, skipped = info.sources["tokens"], info.sources["skipped"]
    lines = [
        f"{out}: {info.rows:,} rows, {tokens['prompt']:,} prompt tokens, "
        f"{tokens['response']:,} response tokens"
    ]
    words = {
        "blank": "blank records skipped",
        "too_long": "prompts skipped as too long",
        "cut": "texts cut into pieces",
    }
    notes = [f"{skipped[k]:,} {words[k]}" for k in words if skipped.get(k)]
    if display.rows:
        rate = display.tokens / max(display.seconds, 1e-9)
        notes.append(
            f"{display.rows:,} rows made in {display.seconds:,.1f} s after start-up: "
            f"{rate:,.0f} response tokens/s"
        )
    else:
        notes.append("complete already")
    return "\n".join([*lines, "; ".join(notes)])


def _parse_engine(text: str | None) -> dict[str, Any]:
    """Parse `--engine`."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AdaDecodeError(
            f"--engine: not JSON ({error}); write it such as "
            "'{\"max_model_len\": 4096}'"
        ) from error
    if not isinstance(value, dict):
        raise AdaDecodeError(
            "--engine: not a JSON object; write it such as '{\"max_model_len\": 4096}'"
        )
    return value
