# SPDX-License-Identifier: Apache-2.0
"""What start-up accepts, and what it makes of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname

from adadecode_vllm import compat, engine_args
from adadecode_vllm.config import engine_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.patches import engine_args as engine_args_patch
from tests.start_up import create, refusal


def test_accepted(model: Path, heads: Path) -> None:
    config = create(model, heads, {"max_early_predictions": 3})
    speculative = config.speculative_config
    assert speculative is not None
    assert speculative.method == "custom_class"
    assert speculative.num_speculative_tokens == 3
    paths = {
        speculative.model: "AdaDecodeProposer",
        config.parallel_config.worker_cls: "AdaDecodeCPUWorker",
        config.scheduler_config.scheduler_cls: "AdaDecodeScheduler",
    }
    for path, name in paths.items():
        assert isinstance(path, str)
        assert resolve_obj_by_qualname(path).__name__ == name
    assert not config.scheduler_config.async_scheduling
    assert not config.use_v2_model_runner


def test_resolved_options_are_part_of_the_configuration(
    model: Path, heads: Path
) -> None:
    """All exits by default; vLLM hashes `additional_config` into its compile cache."""
    config = create(model, heads)
    assert config.additional_config == {
        "adadecode": {
            "heads": str(heads),
            "exit_layers": [1, 3],
            "threshold": 0.75,
            "max_early_predictions": 8,
            "gate": "probability",
            "draft_vocabulary_size": None,
            "last_guess": True,
            "ngram": "chain",
            "lookup": "ngram",
            "disable_by_batch_size": None,
            "policy": "cost",
            "synthetic_acceptance_rate": None,
            "enabled": True,
        }
    }
    fewer = create(model, heads, {"exit_layers": [3]})
    assert fewer.additional_config["adadecode"]["exit_layers"] == [3]
    assert fewer.compute_hash() != config.compute_hash()


def test_other_additional_config_is_kept(model: Path, heads: Path) -> None:
    additional = {"other": 1, "adadecode": {"heads": str(heads)}}
    args = EngineArgs(model=str(model), additional_config=additional)
    config = args.create_engine_config()
    assert config.additional_config["other"] == 1
    assert config.additional_config["adadecode"]["exit_layers"] == [1, 3]
    assert additional == {"other": 1, "adadecode": {"heads": str(heads)}}


def test_the_same_arguments_again(model: Path, heads: Path) -> None:
    args = EngineArgs(model=str(model), **engine_args(str(heads)))
    before = dict(vars(args))
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert first.parallel_config.worker_cls == second.parallel_config.worker_cls
    for name in ("speculative_config", "scheduler_cls", "worker_cls"):
        assert getattr(args, name) == before[name]


def test_the_same_arguments_with_changes(model: Path, heads: Path) -> None:
    args = EngineArgs(model=str(model), **engine_args(str(heads)))
    args.create_engine_config()
    args.additional_config["adadecode"]["max_early_predictions"] = 6
    config = args.create_engine_config()
    assert config.speculative_config is not None
    assert config.speculative_config.num_speculative_tokens == 6
    args.pipeline_parallel_size = 2
    with pytest.raises(AdaDecodeError, match="--pipeline-parallel-size 2"):
        args.create_engine_config()
    args.pipeline_parallel_size = 1
    args.additional_config["adadecode"]["enabled"] = False
    config = args.create_engine_config()
    assert config.speculative_config is None
    assert "adadecode" not in config.parallel_config.worker_cls


@pytest.mark.parametrize(
    "asked", [{}, {"heads": "nowhere", "enabled": False}, {"enabled": False}]
)
def test_not_asked_for_changes_nothing(model: Path, asked: dict[str, Any]) -> None:
    additional = {"adadecode": asked} if asked else {}
    args = EngineArgs(model=str(model), additional_config=additional)
    config = args.create_engine_config()
    original = engine_args_patch._MARK
    untouched = EngineArgs(model=str(model))
    plain = getattr(EngineArgs.create_engine_config, original)(untouched)
    assert config.speculative_config is None
    assert config.parallel_config.worker_cls == plain.parallel_config.worker_cls
    assert "adadecode" not in config.parallel_config.worker_cls
    assert config.scheduler_config.scheduler_cls is None
    assert config.additional_config == additional
    assert engine_config(config) is None
    assert config.scheduler_config.get_scheduler_cls() is (
        plain.scheduler_config.get_scheduler_cls()
    )


def test_off_refuses_nothing(model: Path, heads: Path) -> None:
    config = create(model, heads, {"enabled": False}, pipeline_parallel_size=1)
    assert config.speculative_config is None
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    config = create(model, heads, {"enabled": False}, speculative_config=ngram)
    assert config.speculative_config is not None
    assert config.speculative_config.method == "ngram"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.0rc1", "0.33.0"])
def test_supported_versions(version: str) -> None:
    compat.check_vllm_version(version)
    compat.check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.32.0", "0.3.2", "dev"])
def test_other_versions(version: str) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        compat.check_vllm_version(version)
    assert str(caught.value) == (
        "--plugin adadecode: this version works with vLLM 0.32 or 0.33 and found "
        f"{version}. Install one of them, with the extra `cuda` or `cpu` of "
        "adadecode-vllm, or start without --plugin adadecode."
    )


def test_another_version_is_refused_only_where_asked_for(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: "0.34.1")
    assert "found 0.34.1" in refusal(model, heads)
    assert create(model, heads, {"enabled": False}).speculative_config is None


def test_facts_are_the_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unknown one the newest's: the plugin is loaded before it is asked for."""
    newest = list(compat.SUPPORTED.values())[-1]
    for version, expected in {
        "0.32.1": compat.SUPPORTED["0.32"],
        "0.33.0": compat.SUPPORTED["0.33"],
        "0.34.0": newest,
    }.items():
        monkeypatch.setattr(compat, "installed_version", partial(str, version))
        assert compat.facts.__wrapped__() == expected
