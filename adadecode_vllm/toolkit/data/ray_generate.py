# SPDX-License-Identifier: Apache-2.0
"""Answering prompts with Ray Data: a pool of actors, each with an engine.

A row of the Ray data set is a whole shard, and an actor takes one at a time. Engines
thus see the same batches as a single engine would, and the rows are the same. An actor
hands on each answer as it finishes.
"""

import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Generator, Shards

logger = logging.getLogger(__name__)

_IDS = pa.list_(pa.int32())
_PROMPTS = pa.schema(
    [
        ("shard", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("prompt_ids", pa.list_(_IDS)),
    ]
)
_ANSWER = pa.schema(
    [
        ("shard", pa.int64()),
        ("row", pa.int64()),
        ("token_ids", _IDS),
        ("began", pa.float64()),
    ]
)


class ShardActor:
    """What runs in an actor: one engine, which answers one shard a call."""

    def __init__(self, spec: EngineSpec) -> None:
        # Engines of one machine would otherwise all bind to the same cores; on a
        # machine with GPUs vLLM does not look at this.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Kept for the first call: Ray starts an actor that fails here again and again.
        self._refusal: AdaDecodeError | None = None
        try:
            self._generator = Generator(spec)
        except AdaDecodeError as error:
            self._refusal = error

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Answer the prompts of the shards in a batch, an answer at a time."""
        if self._refusal is not None:
            raise self._refusal
        for shard in batch.to_pylist():
            prompts = dict(zip(shard["rows"], shard["prompt_ids"], strict=True))
            for answer in self._generator.answer(shard["shard"], prompts):
                yield pa.Table.from_pylist([answer._asdict()], schema=_ANSWER)


def generate_with_ray(
    spec: EngineSpec,
    shards: Shards,
    *,
    actors: int,
    address: str | None = None,
) -> Iterator[Answer]:
    """Answer shards with a pool of engines.

    Args:
        spec: The engines' arguments.
        shards: What is to be answered.
        actors: Engines. Each gets its GPUs on a cluster with GPUs, else an equal part
            of the CPUs.
        address: A cluster's address; None starts Ray on this machine, for this run.

    Yields:
        Answers as they finish.

    Raises:
        AdaDecodeError: Ray is missing, cannot be reached or has too little room for
            the actors, or an engine could not be started.
    """
    ray = import_ray()
    if actors > len(shards):
        logger.warning(
            "Only %d shards are left for %d actors; fewer --rows-per-shard give all "
            "of them work",
            len(shards),
            actors,
        )
        actors = len(shards)
    started = _connect(ray, address)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the command shows its own
        # A block an answer: by default answers would wait for 128 MB of them.
        context.target_max_block_size = 1
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        tables = [
            pa.Table.from_pydict(
                {
                    "shard": [index],
                    "rows": [list(prompts)],
                    "prompt_ids": [list(prompts.values())],
                },
                schema=_PROMPTS,
            )
            for index, prompts in shards.items()
        ]
        answered = ray.data.from_arrow(tables).map_batches(
            ShardActor,
            fn_constructor_args=(spec,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=actors, max_tasks_in_flight_per_actor=2
            ),
            **_resources(ray, spec, actors),
        )
        for batch in answered.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for row in batch.to_pylist():
                yield Answer(**row)
    except ray.exceptions.RayError as error:
        raise _sentence(error) from error
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    """Import Ray with Ray Data.

    Raises:
        AdaDecodeError: It is not installed.
    """
    # Ray's own reports about its use; whoever wants them sets the variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise AdaDecodeError(
            f"--ray: Ray Data is not installed ({error}); install the extra: "
            "pip install 'adadecode-vllm[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> bool:
    """Connect to a cluster, or start one; return whether to shut down afterwards."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        options["include_dashboard"] = False
        # Ray would otherwise join a cluster that happens to run on this machine.
        options["address"] = "local"
    else:
        _check_reachable(address)
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise AdaDecodeError(
            f"--ray-address {address}: Ray cannot be reached "
            f"({str(error).strip().splitlines()[0]}); start it with `ray start --head` "
            "or correct the address"
        ) from error
    return True


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto` and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise AdaDecodeError(
            f"--ray-address {address}: nobody answers there ({error}); start Ray with "
            "`ray start --head`, or correct the address"
        ) from error


def _resources(ray: Any, spec: EngineSpec, actors: int) -> dict[str, float]:
    """What each actor asks of the cluster; Ray would wait forever for what it lacks."""
    found = ray.cluster_resources()
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    if gpus:
        each = int(spec.options.get("tensor_parallel_size", 1)) * int(
            spec.options.get("pipeline_parallel_size", 1)
        )
        have, name, wanted = gpus, "GPUs", {"num_gpus": float(each)}
    else:
        each = max(1, cpus // actors)
        have, name, wanted = cpus, "CPUs", {"num_cpus": float(each)}
    if actors * each > have:
        raise AdaDecodeError(
            f"--ray-actors {actors}: they need {actors * each} {name} and Ray has "
            f"{have}; ask for at most {have // each}"
        )
    return wanted


def _sentence(error: Exception) -> AdaDecodeError:
    """The user's mistake inside an actor, or what Ray says, in one sentence."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        if isinstance(inner, AdaDecodeError):
            # Ray Data adds lines about its retries.
            return AdaDecodeError(str(inner).splitlines()[0])
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "AdaDecodeError: " in line:
            return AdaDecodeError(line.partition("AdaDecodeError: ")[2])
    reason = lines[-1] if lines else type(error).__name__
    return AdaDecodeError(
        f"--ray: an actor failed ({reason}); run the command again to continue, with "
        "fewer --ray-actors if memory ran out"
    )
