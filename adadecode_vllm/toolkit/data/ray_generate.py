# SPDX-License-Identifier: Apache-2.0
"""Answering prompts on a Ray cluster: a pool of actors, each with an engine.

An actor takes a whole shard at a time. Engines thus see the same batches as a single
engine would, and the rows are the same. An actor hands on each answer as it finishes.

An actor may die at any time, with its machine or alone. What it had handed on is kept,
its other rows go to the next actor that is free, and another actor is started in its
place as soon as the cluster has room for it. So every row is answered once, as long as
one actor lives.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Generator, Shards

logger = logging.getLogger(__name__)

_MOST_DEATHS = 3
"""Actors that may die one after the other without a single answer in between."""

_TELL_SECONDS = 60.0


class ShardActor:
    """What runs in an actor: one engine, which answers one shard a call."""

    def __init__(self, spec: EngineSpec) -> None:
        # Engines of one machine would otherwise all bind to the same cores; on a
        # machine with GPUs vLLM does not look at this.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Kept for the first call: an actor that fails here seems to have died.
        self._refusal: AdaDecodeError | None = None
        try:
            self._generator = Generator(spec)
        except AdaDecodeError as error:
            self._refusal = error

    def start(self) -> None:
        """Say that the engine has started, or why it could not.

        Raises:
            AdaDecodeError: vLLM refused it.
        """
        if self._refusal is not None:
            raise self._refusal

    def answer(self, shard: int, prompts: dict[int, list[int]]) -> Iterator[Answer]:
        """Answer the prompts of a shard, an answer at a time."""
        yield from self._generator.answer(shard, prompts)


class _Pool:
    """Actors, what each of them does, and the rows that nobody has answered yet.

    Args:
        ray: The module.
        create: Makes an actor.
        size: How many.
        shards: What is to be answered.
    """

    def __init__(self, ray: Any, create: Any, size: int, shards: Shards) -> None:
        self._ray = ray
        self._create = create
        self._left = {index: dict(prompts) for index, prompts in shards.items()}
        self._queue = deque(shards)
        self._starting: dict[Any, Any] = {}  # actors, by what says that they started
        self._working: dict[Any, tuple[Any, int]] = {}  # and shards, by their answers
        self._idle: list[Any] = []
        self._deaths = 0
        for _ in range(size):
            self._start()

    def answers(self) -> Iterator[Answer]:
        """Yield every row's answer once, as they come."""
        while any(self._left.values()):
            self._assign()
            ready, _ = self._ray.wait(
                [*self._starting, *self._working], timeout=_TELL_SECONDS
            )
            if not ready and not self._working:
                logger.warning("Waiting until Ray has room for an engine")
            for one in ready:
                if one in self._starting:
                    self._started(one)
                else:
                    yield from self._next(one)

    def close(self) -> None:
        """End all actors."""
        working = [actor for actor, _ in self._working.values()]
        for actor in (*self._starting.values(), *working, *self._idle):
            self._ray.kill(actor)

    def _start(self) -> None:
        actor = self._create()
        self._starting[actor.start.remote()] = actor

    def _assign(self) -> None:
        """Give shards to actors that have none."""
        while self._idle and self._queue:
            shard = self._queue.popleft()
            actor = self._idle.pop()
            answers = actor.answer.remote(shard, self._left[shard])
            self._working[answers] = actor, shard

    def _started(self, one: Any) -> None:
        actor = self._starting.pop(one)
        try:
            self._ray.get(one)
        except self._ray.exceptions.RayTaskError:
            raise  # a mistake of the user's, or a defect: another try would not help
        except self._ray.exceptions.RayError as error:
            self._died(actor, error)
        else:
            self._idle.append(actor)

    def _next(self, answers: Any) -> Iterator[Answer]:
        """Take an actor's next answer, or see that it has ended its shard, or died."""
        actor, shard = self._working[answers]
        try:
            answer: Answer = self._ray.get(next(answers))
        except StopIteration:
            self._end(answers)
            self._idle.append(actor)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            self._end(answers)
            self._died(actor, error)
        else:
            self._deaths = 0
            if self._left[shard].pop(answer.row, None) is not None:
                yield answer

    def _end(self, answers: Any) -> None:
        """Nothing more comes of a shard's actor: others answer what is left."""
        _, shard = self._working.pop(answers)
        if self._left[shard]:
            self._queue.appendleft(shard)

    def _died(self, actor: Any, error: Exception) -> None:
        self._deaths += 1
        if self._deaths > _MOST_DEATHS:
            raise error
        logger.warning(
            "An engine ended (%s); another one is started", _last_line(error)
        )
        self._ray.kill(actor)  # one that Ray only lost sight of must not go on
        self._start()


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
        actors: Engines. Each gets its GPUs on a cluster with GPUs, else as many CPUs
            of a machine as there are for all of them.
        address: A cluster's address; None starts Ray on this machine, for this run.

    Yields:
        Every row's answer once, as they finish.

    Raises:
        AdaDecodeError: Ray is missing, cannot be reached or has too little room for
            the actors, or engines could not be started, or died again and again.
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
        # SPREAD: over the machines first.
        actor_class = ray.remote(ShardActor).options(
            scheduling_strategy="SPREAD", **_resources(ray, spec, actors)
        )
        pool = _Pool(ray, lambda: actor_class.remote(spec), actors, shards)
        try:
            yield from pool.answers()
        finally:
            pool.close()
    except ray.exceptions.RayError as error:
        raise _sentence(error) from error
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    """Import Ray.

    Raises:
        AdaDecodeError: It is not installed.
    """
    # Ray's own reports about its use; whoever wants them sets the variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise AdaDecodeError(
            f"--ray: Ray is not installed ({error}); install the extra: "
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
        if address is None:
            raise AdaDecodeError(
                f"--ray: Ray cannot be started on this machine ({first_line(error)}); "
                "mend that, or leave --ray out"
            ) from error
        raise AdaDecodeError(
            f"--ray-address {address}: Ray cannot be reached ({first_line(error)}); "
            "start it with `ray start --head` or correct the address"
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
    """What each actor asks of a machine; Ray would wait forever for what none has."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (
        [int(machine.get(name, 0)) for machine in machines] for name in ("GPU", "CPU")
    )
    if any(gpus):
        each = int(spec.options.get("tensor_parallel_size", 1)) * int(
            spec.options.get("pipeline_parallel_size", 1)
        )
        if each > max(gpus):
            raise AdaDecodeError(
                f"--engine: an engine of this tensor_parallel_size needs {each} GPUs "
                f"of one machine, and no machine of Ray's has more than {max(gpus)}; "
                "give a smaller one"
            )
        have, name, wanted = gpus, "GPUs", {"num_gpus": float(each)}
    else:
        each = _equal_part(cpus, actors)
        have, name, wanted = cpus, "CPUs", {"num_cpus": float(each)}
    room = _room(have, each)
    if actors > room:
        of_one = f", {each} of one machine each," if each > 1 else ""
        raise AdaDecodeError(
            f"--ray-actors {actors}: they need {actors * each} {name}{of_one} and Ray "
            f"has room for {room} of them; ask for at most {room}"
        )
    return wanted


def _equal_part(cpus: Sequence[int], actors: int) -> int:
    """Most CPUs that every one of some actors can have; an actor is on one machine."""
    fitting = [
        part
        for part in range(1, max(cpus, default=0) + 1)
        if _room(cpus, part) >= actors
    ]
    return max(fitting, default=1)


def _room(have: Sequence[int], each: int) -> int:
    """How many actors the machines have room for."""
    return sum(number // each for number in have)


def _sentence(error: Exception) -> AdaDecodeError:
    """The user's mistake inside an actor, or what Ray says, in one sentence."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AdaDecodeError):
        return AdaDecodeError(str(cause))
    return AdaDecodeError(
        f"--ray: an actor failed ({_last_line(error)}); run the command again to "
        "continue, with fewer --ray-actors if memory ran out"
    )


def _last_line(error: Exception) -> str:
    """What Ray says last; a traceback or details come before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
