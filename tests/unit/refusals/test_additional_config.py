# SPDX-License-Identifier: Apache-2.0
"""Which options make vLLM compile anew: those that change what is compiled."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.engine import additional_config
from adadecode_vllm.engine.additional_config import AdditionalConfig
from tests.start_up import create

# Another value than the default, of every option that no graph depends on.
NOT_COMPILED: dict[str, Any] = {
    "threshold": 0.4,
    "max_early_predictions": 3,
    "gate": "acceptance",
    "draft_vocabulary_size": 8,
    "last_guess": False,
    "ngram": "tail",
    "lookup": "suffix",
    "disable_by_batch_size": 2,
    "policy": "threshold",
    "synthetic_acceptance_rate": 0.5,
}


def key(exit_layers: list[int], **others: Any) -> str:
    """The hash of options as start-up resolves them, beside others' entries."""
    config = AdaDecodeConfig(heads="H", exit_layers=tuple(exit_layers))
    ours = {"adadecode": config.model_dump(mode="json")}
    return AdditionalConfig({**ours, **others}).compute_hash()


def test_every_option_is_of_one_kind() -> None:
    compiled = {"heads", "exit_layers", "enabled"}
    assert NOT_COMPILED.keys() == AdaDecodeConfig.model_fields.keys() - compiled


@pytest.mark.parametrize("option", sorted(NOT_COMPILED))
def test_options_that_keep_the_cache(option: str) -> None:
    before = AdaDecodeConfig(heads="H", exit_layers=(1, 3)).model_dump(mode="json")
    after = {**before, option: NOT_COMPILED[option]}
    assert after != before
    first, second = ({"adadecode": options} for options in (before, after))
    hashes = [AdditionalConfig(found).compute_hash() for found in (first, second)]
    assert hashes[0] == hashes[1]


def test_the_engines_hash(model: Path, heads: Path, tmp_path: Path) -> None:
    """Other options and other heads of the same exits, in vLLM's own hash."""
    other_heads = tmp_path / "other"
    shutil.copytree(heads, other_heads)
    found = [
        create(model, heads),
        create(model, heads, {"threshold": 0.4, "max_early_predictions": 2}),
        create(model, other_heads, {"ngram": "off"}),
    ]
    assert len({config.compute_hash() for config in found}) == 1
    assert len({str(config.additional_config) for config in found}) == 3
    fewer = create(model, heads, {"exit_layers": [3]})
    longer = create(model, heads, max_num_seqs=3)
    hashes = {config.compute_hash() for config in (found[0], fewer, longer)}
    assert len(hashes) == 3


def test_segments_count() -> None:
    sets = [[0], [1], [3], [1, 3], [1, 2, 3], [13]]
    assert len({key(exits) for exits in sets}) == len(sets)
    # One at the embedding ends no segment.
    assert key([0, 1, 3]) == key([1, 3])


def test_entries_of_others_count() -> None:
    entries: list[dict[str, Any]] = [{}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": {"b": 1}}]
    assert len({key([1], **others) for others in entries}) == len(entries)
    assert key([1], a=1, b=2) == key([1], b=2, a=1)
    without = AdditionalConfig({"a": 1}).compute_hash()
    assert without not in {key([1], a=1), key([0], a=1)}
    with pytest.raises(TypeError, match="JSON"):
        key([1], a=object())


def test_a_kept_plan_of_the_memory_is_for_the_same_options(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    first, same = create(model, heads), create(model, heads)
    more = create(model, heads, {"max_early_predictions": 9})
    assert first.compute_hash() == same.compute_hash() != more.compute_hash()
    # Another version may capture other graphs.
    found = first.compute_hash()
    monkeypatch.setattr(additional_config, "__version__", "another")
    assert first.compute_hash() != found


def test_another_cpus_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where machines of several kinds share a cache."""
    found = key([1])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    assert key([1]) != found


def test_workers_get_the_same(model: Path, heads: Path) -> None:
    """Pickled for other processes, copied for other ranks, changed by vLLM."""
    additional = {"other": [1], "adadecode": {"heads": str(heads)}}
    args = EngineArgs(model=str(model), additional_config=additional)
    config = args.create_engine_config()
    for found in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        replace(config, instance_id="another"),
    ):
        assert found.additional_config == config.additional_config
        assert isinstance(found.additional_config, AdditionalConfig)
        assert found.compute_hash() == config.compute_hash()


def test_others_read_what_they_gave(model: Path, heads: Path) -> None:
    """As a mapping, in the log, and in the JSON of vLLM's `/server_info`."""
    config = create(model, heads, {"threshold": 0.4})
    found = config.additional_config
    assert isinstance(found, AdditionalConfig)
    plain = dict(found)
    assert found == plain
    assert plain == found
    assert str(found) == str(plain)
    shown = TypeAdapter(VllmConfig).dump_python(config, mode="json", fallback=str)
    assert shown["additional_config"] == plain
    assert shown["additional_config"]["adadecode"]["threshold"] == 0.4


def test_a_configuration_from_an_engines_own(model: Path, heads: Path) -> None:
    first = create(model, heads, {"threshold": 0.4})
    args = EngineArgs(model=str(model), additional_config=first.additional_config)
    second = args.create_engine_config()
    assert second.additional_config == first.additional_config
    assert second.compute_hash() == first.compute_hash()
