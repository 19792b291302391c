# SPDX-License-Identifier: Apache-2.0
"""The command `adadecode data` and what it shows while it works."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.remote_code import TrustRemoteCode
from adadecode_vllm.toolkit.data.options import Progress
from adadecode_vllm.toolkit.progress import Meter, Rate, duration, number


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
        int, typer.Option(min=1, help="Rows of a file, answered as one batch.")
    ] = 512,
    dtype: Annotated[
        str, typer.Option(help="vLLM's; auto is float32 on CPUs without AVX-512.")
    ] = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='More vLLM engine arguments: {"max_model_len": 4096}'
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the work over a Ray cluster.")
    ] = False,
    ray_actors: Annotated[
        int | None, typer.Option(min=1, help="Engines to start, by default 1.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Ray cluster; by default this machine."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace data in OUT, once the new data is complete.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make training text: the model answers prompts itself, greedily.

    A run that was interrupted, in whatever way, continues when the same command is
    given again; what was answered is not answered again.
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

    from adadecode_vllm.toolkit.data.make import make_data
    from adadecode_vllm.toolkit.data.options import DataOptions
    from adadecode_vllm.toolkit.data.tasks import Selection

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
                trust_remote_code=trust_remote_code,
                argv=tuple(sys.argv[1:]),
            ),
            display,
        )
    typer.echo(_summary(info, out, display))


class Display(Progress):
    """Shows on stderr how many rows are answered, how fast, and how long it will take.

    Attributes:
        rows: Rows answered in this run.
        tokens: Their answers' tokens.
        seconds: Since the first engine had started.
    """

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.seconds = 0.0
        self._meter = Meter()
        self._rate = Rate()
        self._left = self._unfinished = 0
        self._began = float("inf")

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)

    def start(self, rows: int, done: int) -> None:
        """Show `done` of `rows` rows."""
        self._left = rows - done
        self._meter.start("answers", "rows", rows, done, self._describe)

    def unfinished(self, tokens: int) -> None:
        """Count what unfinished answers have so far."""
        self._unfinished = tokens
        self._rate.see(self.tokens + tokens)
        self._meter.advance(0)

    def answered(self, tokens: int, began: float) -> None:
        """Show a further row."""
        self.rows += 1
        self.tokens += tokens
        self._left -= 1
        self._unfinished = max(0, self._unfinished - tokens)
        self._began = min(self._began, began)
        if not self._rate.started:  # what came before was the engine's start
            self._rate.see(0, time.time() - began)
        self.seconds = time.time() - self._began
        self._rate.see(self.tokens + self._unfinished)
        self._meter.advance()

    def _describe(self) -> str:
        """The speed, and how long the rest takes if it is like what is done."""
        rate = self._rate.per_second
        if rate <= 0:
            return ""
        parts = [f"{number(rate)} tokens/s"]
        if self.rows and self._left:
            expected = self._left * self.tokens / self.rows - self._unfinished
            parts.append(f"{duration(max(0.0, expected) / rate)} left")
        return ", ".join(parts)


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
    except (ValueError, RecursionError) as error:
        raise AdaDecodeError(
            f"--engine: not JSON ({error}); write it such as "
            "'{\"max_model_len\": 4096}'"
        ) from error
    if not isinstance(value, dict):
        raise AdaDecodeError(
            "--engine: not a JSON object; write it such as '{\"max_model_len\": 4096}'"
        )
    return value
