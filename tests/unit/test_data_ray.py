# SPDX-License-Identifier: Apache-2.0
"""What `adadecode data --ray` asks of each machine, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.generate import EngineSpec
from adadecode_vllm.toolkit.data.ray_generate import _connect, _resources


def cluster(*machines: dict[str, float]) -> Any:
    """A Ray with these machines, and one that it has lost."""
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 64.0}}
    alive = [{"Alive": True, "Resources": machine} for machine in machines]
    return SimpleNamespace(nodes=lambda: [lost, *alive])


def spec(**options: Any) -> EngineSpec:
    return EngineSpec("some/model", "auto", 8, options)


@pytest.mark.parametrize(
    ("cpus", "actors", "each"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([8, 8], 1, 8),  # of the 16 no machine has more
        ([8, 8], 2, 8),
        ([8, 8], 3, 4),
        ([1, 1], 2, 1),
        ([8, 2], 2, 4),
        ([8, 3], 3, 3),
        ([8, 0], 8, 1),
    ],
)
def test_an_actor_gets_cpus_of_one_machine(
    cpus: list[int], actors: int, each: int
) -> None:
    ray = cluster(*({"CPU": float(number)} for number in cpus))
    assert _resources(ray, spec(), actors) == {"num_cpus": each}


def test_an_actor_gets_gpus_of_one_machine() -> None:
    ray = cluster({"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0})
    assert _resources(ray, spec(), 8) == {"num_gpus": 1}
    assert _resources(ray, spec(tensor_parallel_size=4), 2) == {"num_gpus": 4}
    both = spec(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert _resources(ray, both, 2) == {"num_gpus": 4}


@pytest.mark.parametrize(
    ("machines", "options", "actors", "sentence"),
    [
        (
            [{"CPU": 4.0}],
            {},
            5,
            "--ray-actors 5: they need 5 CPUs and Ray has room for 4 of them; ask for "
            "at most 4",
        ),
        (
            [{"GPU": 3.0}, {"GPU": 3.0}],
            {"tensor_parallel_size": 2},
            3,
            "--ray-actors 3: they need 6 GPUs, 2 of one machine each, and Ray has room "
            "for 2 of them; ask for at most 2",
        ),
        (
            [{"GPU": 4.0}, {"GPU": 4.0}],
            {"tensor_parallel_size": 8},
            1,
            "--engine: an engine of this tensor_parallel_size needs 8 GPUs of one "
            "machine, and no machine of Ray's has more than 4; give a smaller one",
        ),
    ],
)
def test_what_would_wait_forever_is_refused(
    machines: list[dict[str, float]],
    options: dict[str, Any],
    actors: int,
    sentence: str,
) -> None:
    with pytest.raises(AdaDecodeError) as refused:
        _resources(cluster(*machines), spec(**options), actors)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (None, "--ray: Ray cannot be started on this machine (no room); mend that, or"),
        ("auto", "--ray-address auto: Ray cannot be reached (no room); start it with"),
    ],
)
def test_a_ray_that_does_not_start(address: str | None, sentence: str) -> None:
    """The sentence names the flag that was given."""

    def init(**options: Any) -> None:
        raise RuntimeError("no room")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    with pytest.raises(AdaDecodeError) as refused:
        _connect(ray, address)
    assert str(refused.value).startswith(sentence)
