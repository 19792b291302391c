# SPDX-License-Identifier: Apache-2.0
"""`adadecode data --ray` on two machines, of which one is lost.

The machines are two Ray nodes, each with processes and an object store of its own.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from adadecode_vllm.toolkit.data import make as make_module
from adadecode_vllm.toolkit.data.generate import Answer
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions, Progress
from adadecode_vllm.toolkit.data.shards import load_dataset_info, read_rows
from tests.harness import MAX_MODEL_LEN, MODEL, demo_corpus

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROWS = 12
ENGINE = {
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 1,  # one after the other: a shard's answers come apart
}


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    machines.add_node(num_cpus=1)
    yield machines
    ray.shutdown()
    machines.shutdown()


def engines() -> list[psutil.Process]:
    """Actors, which descend from this process as all of the cluster does."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ShardActor")
        or "".join(process.cmdline()).startswith("ray::ShardActor")
    ]


class Losing(Progress):
    """Kills an engine after three answers, and the second machine after seven."""

    def __init__(self, machines: Any) -> None:
        self._machines = machines
        self.rows = 0
        self.killed = 0

    def answered(self, tokens: int, began: float) -> None:
        self.rows += 1
        if self.rows == 3:
            victims = engines()
            assert len(victims) == 2
            os.kill(victims[0].pid, signal.SIGKILL)
            self.killed += 1
        elif self.rows == 7:
            (machine,) = self._machines.worker_nodes
            self._machines.remove_node(machine, allow_graceful=False)
            self.killed += 1


def test_a_killed_engine_and_a_lost_machine(
    tmp_path: Path,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No row is lost, none is answered twice, and all are those of one engine."""
    path = tmp_path / "problems.jsonl"
    texts = demo_corpus().heldout_problems(ROWS)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = DataOptions(
        out=tmp_path / "alone",
        model=MODEL,
        inputs=(path,),
        chat=False,
        max_new_tokens=60,
        rows_per_shard=3,
        dtype="float32",
        engine=ENGINE,
    )
    alone = make_data(options)

    given: Counter[int] = Counter()
    original = make_module._answers

    def counting(*args: Any) -> Iterator[Answer]:
        for answer in original(*args):
            given[answer.row] += 1
            yield answer

    monkeypatch.setattr(make_module, "_answers", counting)
    losing = Losing(cluster)
    spread = replace(
        options,
        out=tmp_path / "spread",
        ray_actors=2,
        ray_address=cluster.address,
    )
    info = make_data(spread, losing)
    assert losing.killed == 2
    assert "An engine ended (" in caplog.text
    assert given == dict.fromkeys(range(ROWS), 1)
    assert list(read_rows(spread.out)) == list(read_rows(options.out))
    assert info.fingerprint == alone.fingerprint
    assert load_dataset_info(spread.out).complete
    assert not list(spread.out.glob("part-*.jsonl"))
