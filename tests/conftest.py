# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before torch or vLLM is imported."""

import os
import signal

import pytest

from tests.feature_matrix import Collector

# The demo model is far too small to gain from threads, and OpenMP workers that wait for
# each other make a busy machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Processes that run tests side by side would all bind their engines to the same core.
CORES = sorted(os.sched_getaffinity(0))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    core = CORES[int(worker.removeprefix("gw")) % len(CORES)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
# A shell starts what it runs in the background with interrupts ignored, and so would
# every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """What all tests say of the features, for the test that compares it."""
    config.pluginmanager.register(Collector(), "adadecode-features")


@pytest.fixture
def a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one engine, or two engines, have a core each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[-1]}")
