# SPDX-License-Identifier: Apache-2.0
"""Any configuration and any option of a request is read or refused with a sentence."""

from __future__ import annotations

import argparse
import json
import math
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm import plugin
from adadecode_vllm.config import CONFIG_KEY, AdaDecodeConfig, parse_config
from adadecode_vllm.engine.arguments import (
    merge_into_additional_config,
    options_from_flags,
)
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.request_options import (
    PREFIX,
    parse_request_options,
)
from tests.harness import HEADS, MODEL
from tests.reliability.load import log_errors
from tests.server_process import Server, complete

HTTP_REQUESTS = 25
LONGEST_SENTENCE = 2000
CONFIG = parse_config({"heads": HEADS})

_fuzz = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# Text that no encoding or terminal likes, and what nearly is an option.
_WORDS = st.sampled_from(
    ["", "0.5", "true", "null", "NaN", "a\nb", "\x1b[31m", "\x00", "\ud800", "é", "\r"]
)
_TEXT = _WORDS | st.text(max_size=20)
_NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0])
    # Python does not write down integers of so many digits.
    | st.just(5000).map(lambda digits: 10**digits)
)
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=3)
    ),
    max_leaves=10,
)
_SOUND: dict[str, st.SearchStrategy[Any]] = {
    "heads": st.just(HEADS),
    "exit_layers": st.none() | st.sets(st.integers(1, 9), min_size=1).map(sorted),
    "threshold": st.floats(0, 1),
    "max_early_predictions": st.integers(1, 128),
    "gate": st.sampled_from(["probability", "acceptance"]),
    "draft_vocabulary_size": st.none() | st.integers(0, 2048),
    "last_guess": st.booleans(),
    "disable_by_batch_size": st.none() | st.integers(1, 64),
    "synthetic_acceptance_rate": st.none() | st.floats(0, 1),
    "enabled": st.booleans(),
}
_SOUND_OBJECTS = st.fixed_dictionaries({}, optional=_SOUND)
_NEARLY_RIGHT = st.builds(
    lambda sound, odd: {**sound, **odd},
    _SOUND_OBJECTS,
    st.dictionaries(st.sampled_from(sorted(_SOUND)) | _TEXT, _VALUES, max_size=2),
)
_DAMAGED = st.builds(
    lambda value, cut, put: _dump(value)[:cut] + put,
    _NEARLY_RIGHT,
    st.integers(0, 60),
    _TEXT,
)


def _dump(value: Any) -> str:
    """JSON with integers of any length, as a user may write them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:d}" if abs(value) < 10**4000 else "1" + "0" * 5000
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)}: {_dump(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


_TEXTS = _TEXT | _VALUES.map(_dump) | _NEARLY_RIGHT.map(_dump) | _DAMAGED


def _read(
    text: str, *, heads: str | None = HEADS
) -> tuple[dict[str, Any], AdaDecodeConfig]:
    """What the `vllm` command does with the flags."""
    flags = argparse.Namespace(
        plugin="adadecode", adadecode_heads=heads, adadecode_config=text
    )
    options = options_from_flags(flags)
    assert options is not None
    merged = merge_into_additional_config(None, options)
    return merged, parse_config(merged[CONFIG_KEY])


def _is_a_sentence(error: AdaDecodeError, name: str) -> None:
    """Named, in one line, of a length that can be read, and printable anywhere."""
    message = str(error)
    assert message.startswith(name), message
    assert message.endswith("."), message
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), message
    assert len(message) < LONGEST_SENTENCE, message
    message.encode()


@_fuzz
@given(_TEXTS)
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example('{"exit_layers": ' + "[" * 500 + "]" * 500 + "}")
@example('{"threshold": 1' + "0" * 5000 + "}")
@example('{"max_early_predictions": 1' + "0" * 5000 + "}")
@example('{"threshold": NaN, "synthetic_acceptance_rate": -Infinity}')
@example('{"max_early_predictions": true}')
@example('{"threshold": 0.5, "threshold": 0.6}')
@example('{"\\ud800": 1, "gate": "\\ud800"}')
@example('{"gate": "\\n"}')
@example('{"a\\nb": 1}')
@example('{"x": "' + "y" * 100_000 + '"}')
@example('{"gate": "' + "y" * 100_000 + '"}')
@example("\ufeff{}")
@example('\udcff{"threshold": 0.5}')
@example('{"heads": "other"}')
@example('{"heads": null}')
@example('{"heads": "a\\nb"}')
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    try:
        _, config = _read(text)
    except AdaDecodeError as error:
        _is_a_sentence(error, "--adadecode-")
        return
    assert 0 <= config.threshold <= 1
    assert 1 <= config.max_early_predictions <= 128
    again = parse_config(json.loads(config.model_dump_json()))
    assert again == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        ('{"threshold": 1' + "0" * 5000 + "}", "is not JSON (Exceeds the limit"),
        ("[0.5,\n2]", "expected a JSON object, got [0.5,\\n2]. Write"),
        ('{"\\ud800": 1}', "unknown option '\\ud800'. Options are"),
        ('{"' + "y" * 900 + '": 1}', "unknown option '" + "y" * 199 + ".... Options"),
        ('{"exit_layers": ["a"' + ', "a"' * 99 + "]}", "Further mistakes: "),
    ],
)
def test_found_in_configurations(text: str, sentence: str) -> None:
    """These ended in other exceptions, or in many lines."""
    with pytest.raises(AdaDecodeError) as caught:
        _read(text)
    _is_a_sentence(caught.value, "--adadecode-config: ")
    assert sentence in str(caught.value)


@_fuzz
@given(_VALUES | _NEARLY_RIGHT)
def test_any_object_is_a_configuration_or_refused(options: Any) -> None:
    """`additional_config` of Python, and `--additional-config`."""
    try:
        config = parse_config(options)
    except AdaDecodeError as error:
        _is_a_sentence(error, "--adadecode-")
        return
    assert parse_config(config.model_dump()) == config


@_fuzz
@given(_VALUES | _NEARLY_RIGHT, _SOUND_OBJECTS)
def test_flags_beside_an_additional_config(present: Any, options: Any) -> None:
    try:
        merged = merge_into_additional_config({CONFIG_KEY: present}, options)
    except AdaDecodeError as error:
        _is_a_sentence(error, "--ad")
        return
    assert merged[CONFIG_KEY] == {**present, **options}


@_fuzz
@given(_SOUND_OBJECTS)
def test_sound_options_are_kept(options: dict[str, Any]) -> None:
    _, config = _read(json.dumps(options))
    for name, value in options.items():
        found = getattr(config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value
    assert not math.isnan(config.threshold)


@settings(_fuzz, max_examples=100)
@given(_TEXTS | _SOUND_OBJECTS.map(json.dumps))
def test_engines_are_configured_or_refused(text: str) -> None:
    """What parses goes on through vLLM's own engine arguments."""
    plugin.register()
    try:
        merged, config = _read(text)
        args = EngineArgs(MODEL, dtype="float32", additional_config=merged)
        engine = args.create_engine_config()
    except AdaDecodeError as error:
        _is_a_sentence(error, "--adadecode-")
        return
    found = engine.speculative_config
    assert (found is not None) == config.enabled
    if found is not None:
        assert found.num_speculative_tokens == config.max_early_predictions


_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "adadecode_enabled": st.booleans() | st.sampled_from(["true", "false", 0, 1, 2]),
    "adadecode_threshold": st.floats(-0.5, 1.5),
    "adadecode_ngram": st.sampled_from(["off", "chain", "tails", ""]),
    "adadecode_max_early_predictions": st.integers(-1, 7),
}
_NAMES = st.sampled_from([*sorted(_OPTIONS), PREFIX, "other"]) | _TEXT.map(
    lambda text: PREFIX + text
)
_XARGS = st.builds(
    lambda sound, odd: {**sound, **odd},
    st.fixed_dictionaries({}, optional=_OPTIONS),
    st.dictionaries(_NAMES, _VALUES, max_size=2),
)


@_fuzz
@given(_XARGS)
@example({"adadecode_threshold": 10**5000})
@example({"adadecode_max_early_predictions": 10**5000})
@example({"adadecode_a\nb": 1})
@example({"adadecode_threshold": "a\nb"})
@example({"adadecode_threshold": "-1e0"})
@example({"adadecode_max_early_predictions": "-1"})
@example({"adadecode_enabled": "\ud800"})
@example({"adadecode_\ud800": 1})
@example({"adadecode_" + "x" * 100_000: 1})
@example({"adadecode_threshold": "x" * 100_000})
@example({"adadecode_self": 1})
def test_any_options_of_a_request_are_read_or_refused(xargs: dict[str, Any]) -> None:
    try:
        found = parse_request_options(xargs, CONFIG)
    except AdaDecodeError as error:
        _is_a_sentence(error, PREFIX)
        return
    assert found.threshold is None or 0 <= found.threshold <= 1
    cap = found.max_early_predictions
    assert cap is None or 0 <= cap <= CONFIG.max_early_predictions
    given_again = {
        PREFIX + name: value
        for name, value in found.model_dump(exclude_unset=True).items()
    }
    assert parse_request_options(given_again, CONFIG) == found


def _post(server: Server, prompt: str, xargs: str) -> tuple[int, str]:
    """Status and body of the answer to a request with any text as its options."""
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 64}
    text = json.dumps(body)[:-1] + f', "vllm_xargs": {xargs}}}'
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=text.encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("xargs", "sentence"),
    [
        ({"adadecode_\ud800": 1}, "adadecode_\\ud800: unknown option"),
        ({"adadecode_a\nb": 1}, "adadecode_a\\nb: unknown option"),
        ({"adadecode_threshold": 10**5000}, "= int too large to be shown is refused"),
        (
            {"adadecode_max_early_predictions": 10**5000},
            "= int too large to be shown is refused: this engine reserves room for 8",
        ),
    ],
    ids=["surrogate", "newline", "threshold", "cap"],
)
def test_found_in_options_of_requests(xargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        parse_request_options(xargs, CONFIG)
    _is_a_sentence(caught.value, PREFIX)
    assert sentence in str(caught.value)


@pytest.mark.server
def test_a_server_answers_any_options_and_disturbs_nobody(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    answers: Counter[tuple[int, bool]] = Counter()

    @settings(_fuzz, max_examples=HTTP_REQUESTS)
    @given(_XARGS, st.sampled_from(range(len(prompts))))
    @example({"adadecode_\ud800": 1}, 0)
    @example({"adadecode_threshold": "\ud800"}, 1)
    @example({"adadecode_threshold": math.nan}, 2)
    @example({"adadecode_threshold": "a\nb"}, 3)
    @example({"adadecode_threshold": 0.25}, 4)
    @example({"adadecode_max_early_predictions": 10**4000}, 5)
    def fuzz(xargs: dict[str, Any], number: int) -> None:
        neighbour = pool.submit(complete, server.client, prompts[number - 1])
        status, body = _post(server, prompts[number], _dump(xargs))
        assert status in (200, 400), body
        if status == 200:
            assert json.loads(body)["choices"][0]["text"] == expected[number]
        answers[status, PREFIX in body] += 1
        assert neighbour.result() == expected[number - 1]

    with ThreadPoolExecutor(2) as pool:
        fuzz()
    assert all(answers[kind] for kind in ((200, False), (400, True))), answers
    assert server.process.poll() is None
    assert complete(server.client, prompts[0]) == expected[0]
    assert log_errors(server.log) == []
