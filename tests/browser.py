# SPDX-License-Identifier: Apache-2.0
"""A page in headless Chromium, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """Its path; skips the test where there is none."""
    for name in (os.environ.get("CHROMIUM", ""), *_NAMES):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no Chromium: install Debian's `chromium`, or set CHROMIUM to its path")


def open_page(url: str, profile: Path, *, milliseconds: int) -> tuple[str, list[str]]:
    """Let a page run for a while.

    Args:
        url: Its address.
        profile: A new directory.
        milliseconds: How long its timers think that it ran.

    Returns:
        The document as it is then, and what was written to the browser's console,
        errors and violations of the page's policy among it.
    """
    done = subprocess.run(
        [
            find_chromium(),
            "--headless=new",
            "--no-sandbox",  # which root may not use
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            f"--virtual-time-budget={milliseconds}",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console
