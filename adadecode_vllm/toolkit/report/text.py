# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them; the report and the model card share them."""

import math

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


def _format(value: float | None, template: str) -> str:
    """Fill the template; NaN is what a mean over nothing gives."""
    return MISSING if value is None or math.isnan(value) else template.format(value)
