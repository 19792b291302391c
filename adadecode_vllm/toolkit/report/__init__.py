# SPDX-License-Identifier: Apache-2.0
"""Reports on exit heads: plots and one page from `evaluation.json` and `history.json`.

`schema` says what the two files hold, `plots` draws, `html` writes the page. Importing
the package costs little: matplotlib is imported when something is drawn.
"""

from adadecode_vllm.toolkit.report.schema import (
    Evaluation,
    History,
    parse_evaluation,
    parse_history,
)
from adadecode_vllm.toolkit.report.write import write_report

__all__ = [
    "Evaluation",
    "History",
    "parse_evaluation",
    "parse_history",
    "write_report",
]
