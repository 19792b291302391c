# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from adadecode_vllm import __version__

if TYPE_CHECKING:
    from adadecode_vllm.toolkit.doctor.finding import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model to serve: a directory or a Hugging Face name.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Argument(
            metavar="HEADS",
            help="Its exit heads: a directory or a Hugging Face name.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for machines.")
    ] = False,
) -> None:
    """Tell what would stop or slow a server here, and what speed to expect.

    The exit code is 0 when nothing stops it, and 1 when something does.
    """
    from adadecode_vllm.toolkit.doctor.examine import examine
    from adadecode_vllm.toolkit.doctor.finding import all_well

    findings = examine(model, heads)
    well = all_well(findings)
    if as_json:
        report = {
            "adadecode_vllm": __version__,
            "ok": well,
            "findings": [finding.to_dict() for finding in findings],
        }
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(findings)
    raise typer.Exit(0 if well else 1)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", style="italic")
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(status, finding.check, text)
    console = Console(highlight=False)
    console.print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    console.print(
        f"{_count(problems, 'problem')} and {_count(warnings, 'warning')}", style="bold"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
