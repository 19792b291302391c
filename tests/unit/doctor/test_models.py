# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: models and heads, whole, damaged and of another kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, save_heads
from adadecode_vllm.toolkit.doctor.examine import examine
from adadecode_vllm.toolkit.doctor.finding import all_well
from adadecode_vllm.toolkit.doctor.model import read_model
from tests.command import run
from tests.findings import by_check, damage
from tests.harness import HEADS, MODEL
from tests.tiny import save_tiny_llama


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


def test_errors_of_users_stay_errors() -> None:
    """A wrong option is the command line's mistake, not a finding."""
    assert run("doctor", "--nonsense") == 2
    with pytest.raises(AdaDecodeError):
        read_model("")
