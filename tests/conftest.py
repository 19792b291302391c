# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before torch or vLLM is imported."""

import os

# The demo model is far too small to gain from threads, and OpenMP workers that wait for
# each other make a busy machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
