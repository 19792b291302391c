# SPDX-License-Identifier: Apache-2.0
"""Figures as people read them; the report and the model card share them."""

import math
from collections.abc import Mapping

MISSING = "-"


def percent(share: float | None) -> str:
    """Format a share in [0, 1], such as `93.4 %`."""
    return _format(None if share is None else 100 * share, "{:.1f} %")


def ratio(value: float | None) -> str:
    """Format a ratio, such as `1.83x`."""
    return _format(value, "{:.2f}x")


def decimal(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed count of decimals."""
    return _format(value, f"{{:.{digits}f}}")


def count(value: int) -> str:
    """Format a count with thousands set apart, such as `155,648`."""
    return f"{value:,}"


def short(value: float) -> str:
    """Format a threshold or a setting without trailing zeros, such as `0.75`."""
    return f"{value:g}"


def conditions(requests: int, row_costs: Mapping[str, float]) -> str:
    """Say what a predicted speedup is for.

    Args:
        requests: Requests at a time.
        row_costs: Cost of a pass over the weights by its rows, in those of one row.

    Returns:
        Such as `one request at a time, where 10 rows cost 1.42 times one`.
    """
    together = "one request" if requests == 1 else f"{requests} requests"
    rows, cost = max((int(rows), cost) for rows, cost in row_costs.items())
    more = f"{rows} rows cost {cost:.2f} times one"
    return f"{together} at a time, where {'rows cost nothing' if cost == 1 else more}"


def among(tokens: int | None) -> str:
    """Say among which tokens top tokens were compared, behind what says of whom.

    Args:
        tokens: Of the draft vocabulary that heads were trained on; None for all.

    Returns:
        Nothing for all, else words with a blank before them.
    """
    if tokens is None:
        return ""
    return f" among the {count(tokens)} tokens of the draft vocabulary"


def _format(value: float | None, template: str) -> str:
    """Fill the template; NaN is what a mean over nothing gives."""
    return MISSING if value is None or math.isnan(value) else template.format(value)
