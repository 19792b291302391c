# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before torch or vLLM is imported."""

import os

# The demo model is far too small to gain from threads, and OpenMP workers that wait for
# each other make a busy machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Processes that run tests side by side would all bind their engines to the same core.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
