# SPDX-License-Identifier: Apache-2.0
"""The load of `load.py`, in short."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.load import failures, make_jobs, memory, run_load, table

MAX_GROWTH = {"server": 0.01, "engine": 0.01, "worker": 0.08}
"""The worker still warms up: kernels for other numbers of rows, as in plain vLLM.

Most are there after a thousand requests; the long run is bounded more tightly.
"""

_SOUND = {
    "requests": 10,
    "completed": 8,
    "aborted": 2,
    "streams_aborted_before_the_first_token": 1,
    "streams_aborted_midway": 1,
    "preemptions": 3,
    "accepted_drafts": 5,
    "rejected_drafts": 4,
    "mismatches": 0,
    "client_errors": [],
    "log_errors": [],
    "server_lives": True,
    "leaked_blocks": 0,
    "requests_left": 0,
    "memory": {
        "engine": {"half_mib": 100.0, "end_mib": 101.0, "growth_second_half": 0.004}
    },
    "memory_of_ordinary_server": {},
    "seconds": 1.0,
}


@pytest.mark.server
@pytest.mark.parametrize(
    ("requests", "max_growth"),
    [
        # Too few to tell a leak of memory from a warm-up.
        pytest.param(80, dict.fromkeys(MAX_GROWTH, math.inf), marks=pytest.mark.slow),
        pytest.param(500, MAX_GROWTH, marks=pytest.mark.slow),
    ],
)
def test_texts_and_resources_under_load(
    tmp_path: Path, requests: int, max_growth: dict[str, float]
) -> None:
    jobs = make_jobs(requests, abort_share=0.2, seed=1)
    results = run_load(jobs, concurrency=64, directory=tmp_path)
    assert failures(results, max_growth) == [], table(results)


def test_a_load_is_what_was_asked_for() -> None:
    jobs = make_jobs(200, abort_share=0.2, seed=0)
    assert jobs == make_jobs(200, abort_share=0.2, seed=0)
    assert sum(job.abort_at is not None for job in jobs) == 40
    assert len({len(job.prompt) for job in jobs}) > 50
    for kinds in ({job.stream for job in jobs}, {bool(job.options) for job in jobs}):
        assert kinds == {True, False}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mismatches": 1}, "mismatches = 1"),
        ({"client_errors": ["E"]}, "client_errors = ['E']"),
        ({"log_errors": ["ERROR"]}, "log_errors = ['ERROR']"),
        ({"leaked_blocks": 2}, "leaked_blocks = 2"),
        ({"preemptions": 0}, "no preemptions"),
        ({"rejected_drafts": 0}, "no rejected_drafts"),
        ({"completed": 7}, "requests are unaccounted for"),
        (
            {"memory": {"engine": {"growth_second_half": 0.03}}},
            "engine grew by 3.0%",
        ),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], sentence: str) -> None:
    assert failures(_SOUND) == []
    assert failures(_SOUND | change) == [sentence]
    assert "| mismatches | 0 |" in table(_SOUND)


def test_growth_is_that_of_the_second_half() -> None:
    warms_up = [(n, {"engine": (100 + min(n, 5)) << 20}) for n in range(11)]
    assert memory(warms_up)["engine"]["growth_second_half"] == 0
    leaks = [(n, {"engine": (100 + n) << 20}) for n in range(11)]
    assert memory(leaks)["engine"] == {
        "start_mib": 100.0,
        "half_mib": 105.0,
        "end_mib": 110.0,
        "growth_second_half": 0.0476,
    }
