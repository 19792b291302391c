# SPDX-License-Identifier: Apache-2.0
"""`adadecode stats`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated

import typer


def stats_command(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server's address.")
    ] = "http://localhost:8000",
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two readings.")
    ] = 2.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Print what was counted so far, and end; so it is without a terminal.",
        ),
    ] = False,
) -> None:
    """Show what a running server's early predictions do, live."""
    from rich.console import Console
    from rich.live import Live

    from adadecode_vllm.errors import AdaDecodeError
    from adadecode_vllm.toolkit.stats.snapshot import metrics_url, read
    from adadecode_vllm.toolkit.stats.view import view

    console = Console()
    address = metrics_url(url)
    newest = read(address)
    if once or not console.is_terminal:
        console.print(view(address, newest, None))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        live.update(view(address, newest, None), refresh=True)
        while True:
            time.sleep(interval)
            try:
                current = read(address)
            except AdaDecodeError as error:
                # A server that restarts comes back; what was seen last stays.
                live.update(view(address, newest, None, str(error)), refresh=True)
                continue
            lately = current.since(newest)
            newest = current
            live.update(
                view(address, current, None if lately.counted.restarted else lately),
                refresh=True,
            )
