# SPDX-License-Identifier: Apache-2.0
"""Mistakes a user can mend, and words for what others raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class AdaDecodeError(ValueError):
    """A user's mistake: a wrong flag, directory or combination of options.

    The message is for the user alone and says three things: the flag or option that is
    wrong, the reason, and the remedy. The CLI prints it without a traceback and exits
    with code 2. Defects of this package raise other exceptions.
    """


def first_line(error: BaseException) -> str:
    """Say an error in one line, within a sentence.

    Args:
        error: What was raised.

    Returns:
        The first line of its text without a full stop, or its kind if it has none.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def problems(error: ValidationError) -> list[str]:
    """Say what pydantic found, each in a few words.

    Args:
        error: Its report.

    Returns:
        Place and reason of each problem, as in `heads.0: must be a name`; the reason
        alone for what is wrong with the whole.
    """
    found = []
    for detail in error.errors(include_url=False):
        place = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return found
