# SPDX-License-Identifier: Apache-2.0
"""Options of a single request, and who refuses the bad ones."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from adadecode_vllm.config import parse_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.patches import request_options as patch
from adadecode_vllm.request_options import (
    ENGINES,
    RequestOptions,
    parse_request_options,
)

CONFIG = parse_config({"heads": "H", "max_early_predictions": 4})


def parse(**options: Any) -> RequestOptions:
    return parse_request_options(
        {f"adadecode_{name}": value for name, value in options.items()}, CONFIG
    )


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1, "ada": 2}, {1: "x"}])
def test_requests_that_ask_for_nothing(extra_args: Any) -> None:
    assert parse_request_options(extra_args, CONFIG) is ENGINES


def test_what_is_given_is_read() -> None:
    found = parse(threshold=0.3, max_early_predictions=2, enabled=True)
    assert found == RequestOptions(threshold=0.3, max_early_predictions=2)


@pytest.mark.parametrize("value", [False, 0, "false", "0"])
def test_http_knows_no_booleans(value: Any) -> None:
    """vLLM's `vllm_xargs` are strings and numbers."""
    assert parse(enabled=value).enabled is False


@pytest.mark.parametrize(
    ("options", "predicts"),
    [
        ({}, None),
        ({"enabled": False}, False),
        ({"enabled": False, "threshold": 0.5}, False),
        ({"max_early_predictions": 0}, False),
        ({"max_early_predictions": 3}, None),
        ({"threshold": 1}, False),
        ({"threshold": 0.5}, True),
    ],
)
def test_whether_a_request_predicts(
    options: dict[str, Any], predicts: bool | None
) -> None:
    assert parse(**options).predicts is predicts


@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        # Of the engine's: early predictions and n-gram drafts, one of them, none.
        ({}, [True, True, True, False]),
        ({"threshold": 1}, [True, False, True, False]),
        ({"threshold": 0.5}, [True, True, True, True]),
        ({"ngram": "tail"}, [True, True, True, True]),
        ({"ngram": "first"}, [True, True, True, True]),
        ({"ngram": "off"}, [True, True, False, False]),
        ({"ngram": "tail", "threshold": 1}, [True, True, True, True]),
        ({"ngram": "tail", "enabled": False}, [False] * 4),
        ({"ngram": "tail", "max_early_predictions": 0}, [False] * 4),
    ],
)
def test_whether_a_request_drafts(options: dict[str, Any], drafts: list[bool]) -> None:
    engines = [(True, True), (True, False), (False, True), (False, False)]
    own = parse(**options)
    assert [own.may_draft(early=e, ngram=n) for e, n in engines] == drafts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 1.5}, "adadecode_threshold = 1.5 is refused: Input should be"),
        ({"threshold": "high"}, "adadecode_threshold = 'high' is refused"),
        ({"threshold": float("nan")}, "adadecode_threshold = nan is refused"),
        ({"threshold": [0.5]}, "adadecode_threshold = [0.5] is refused"),
        ({"max_early_predictions": -1}, "adadecode_max_early_predictions = -1"),
        ({"max_early_predictions": 2.5}, "adadecode_max_early_predictions = 2.5"),
        ({"max_early_predictions": 5}, "this engine reserves room for 4. Ask for"),
        ({"enabled": "perhaps"}, "adadecode_enabled = 'perhaps' is refused"),
        ({"treshold": 0.5}, "adadecode_treshold: unknown option. A request may give"),
        ({"heads": "H"}, "adadecode_heads: unknown option"),
    ],
)
def test_bad_options_are_named_with_reason_and_remedy(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        parse(**options)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


def front_door(options: dict[str, Any] | None) -> Any:
    additional = {} if options is None else {"adadecode": options}
    return SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=additional),
        speculative_config="drafts",
    )


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's validation with the patch, which then accepts everything."""
    monkeypatch.setattr(InputProcessor, "_validate_params", lambda *arguments: "vLLM's")
    patch.install()
    patch.install()
    return InputProcessor._validate_params


def test_the_front_door_refuses(validate: Any) -> None:
    bad = SimpleNamespace(extra_args={"adadecode_threshold": 2})
    with pytest.raises(VLLMValidationError, match="adadecode_threshold = 2 is refused"):
        validate(front_door({"heads": "H"}), bad, ())
    good = SimpleNamespace(extra_args={"adadecode_threshold": 0.2})
    assert validate(front_door({"heads": "H"}), good, ()) == "vLLM's"
    assert validate(front_door({"heads": "H"}), SimpleNamespace(), ()) == "vLLM's"


def test_the_front_door_lets_in_what_is_served_without_drafts(validate: Any) -> None:
    """vLLM refuses min_p and others to engines with a speculative method."""
    ours, other = front_door({"heads": "H"}), front_door(None)
    for door in (ours, other):
        assert validate(door, SimpleNamespace(), ()) == "vLLM's"
    assert ours.speculative_config is None
    assert other.speculative_config == "drafts"


@pytest.mark.parametrize("ours", [True, False])
def test_beams_with_a_list_of_tokens_are_let_in_too(
    monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """As vLLM 0.33 asks before it takes them."""
    monkeypatch.setattr(InputProcessor, "_validate_params", lambda *arguments: None)
    asked = []

    def configure_logprobs(self: Any, params: Any, config: Any) -> str:
        asked.append(config.speculative_config)
        return "vLLM's"

    monkeypatch.setattr(
        BeamSearchParams, "configure_logprobs", configure_logprobs, raising=False
    )
    patch.install()
    patch.install()
    config = front_door({"heads": "H"} if ours else None).vllm_config
    config.speculative_config = "drafts"
    beams: Any = BeamSearchParams(beam_width=2, max_tokens=2)
    assert beams.configure_logprobs(None, config) == "vLLM's"
    assert asked == [None if ours else "drafts"]
    assert config.speculative_config == "drafts"


def test_vllm_still_asks_for_the_speculative_method_there() -> None:
    """And for nothing else: it is taken away from the front door."""
    source = inspect.getsource(InputProcessor)
    assert source.count("self.speculative_config") == 2
    verify = inspect.getsource(SamplingParams.verify)
    assert verify.count("speculative_config") == 3


@pytest.mark.parametrize("options", [None, {"heads": "H", "enabled": False}])
def test_other_engines_are_none_of_its_business(
    validate: Any, options: dict[str, Any] | None
) -> None:
    odd = SimpleNamespace(extra_args={"adadecode_threshold": 2})
    assert validate(front_door(options), odd, ()) == "vLLM's"


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(InputProcessor, "_validate_params")
    with pytest.raises(RuntimeError, match="has no _validate_params"):
        patch.install()


def test_vllm_still_validates_through_logits_processors_only() -> None:
    """Fails once a speculative method can validate: then the patch can go."""
    source = inspect.getsource(inspect.unwrap(InputProcessor._validate_params))
    assert "validate_logits_processors_params" in source
    assert "validate_speculative" not in source
