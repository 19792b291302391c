# SPDX-License-Identifier: Apache-2.0
"""Make a failing case small: fewer requests, fewer options, simpler values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from tests.reliability.differential.case import Engine, Request

Fails = Callable[[Engine, list[Request]], bool]
_T = TypeVar("_T")

_KEPT = ("max_model_len", "block_size")
"""Arguments whose defaults are of another kind; they are cheap to leave as they are."""


def shrink(
    engine: Engine, requests: list[Request], fails: Fails, seconds: float
) -> tuple[Engine, list[Request]]:
    """Shrink greedily, requests before engines, since those cost no start.

    Args:
        engine: The engine.
        requests: A stream that fails on it.
        fails: Whether another case fails in the same way.
        seconds: Most to spend.

    Returns:
        The smallest case found.
    """
    end = time.monotonic() + seconds

    def still(engine: Engine, requests: list[Request]) -> bool:
        return time.monotonic() < end and fails(engine, requests)

    requests = _shrink_requests(engine, requests, still)
    smaller = _first_that_fails(
        engine, _simpler_engines, lambda engine: still(engine, requests)
    )
    if smaller != engine:
        requests = _shrink_requests(smaller, requests, still)
    return smaller, requests


def _shrink_requests(
    engine: Engine, requests: list[Request], fails: Fails
) -> list[Request]:
    requests = _drop(requests, lambda some: fails(engine, some))
    for number in range(len(requests)):

        def with_one(request: Request, number: int = number) -> bool:
            changed = [*requests[:number], request, *requests[number + 1 :]]
            return fails(engine, changed)

        requests[number] = _first_that_fails(requests[number], _simpler, with_one)
    return requests


def _drop(items: list[_T], fails: Callable[[list[_T]], bool]) -> list[_T]:
    """Leave out runs of items, long ones first."""
    size = len(items) // 2
    while size:
        start = 0
        while start < len(items):
            fewer = items[:start] + items[start + size :]
            if fewer and fails(fewer):
                items = fewer
            else:
                start += size
        size //= 2
    return list(items)


def _first_that_fails(
    value: _T,
    simpler: Callable[[_T], Iterator[_T]],
    fails: Callable[[_T], bool],
) -> _T:
    """Replace a value by a simpler one that fails as well, as long as there is one."""
    tried: list[_T] = []
    while True:
        for candidate in simpler(value):
            if candidate != value and candidate not in tried:
                tried.append(candidate)
                if fails(candidate):
                    value = candidate
                    break
        else:
            return value


def _simpler(request: Request) -> Iterator[Request]:
    """Simpler requests, the boldest changes first."""
    if request.chunks:
        yield replace(request, chunks=[])
        yield replace(request, chunks=request.chunks[:-1])
    if request.abort_after is not None:
        yield replace(request, abort_after=None)
    if request.priority:
        yield replace(request, priority=0)
    for name in request.params:
        if name not in ("max_tokens", "temperature", "top_k"):
            params = dict(request.params)
            del params[name]
            yield replace(request, params=params)
    if request.params.get("temperature") and "n" not in request.params:
        params = {**request.params, "temperature": 0}
        params.pop("top_k", None)
        yield replace(request, params=params)
    most = request.params.get("max_tokens")
    for fewer in () if most is None else (1, most // 2, most - 1):
        if 0 < fewer < most:
            yield replace(request, params=_at_most(request.params, fewer))
    for fewer in (0, request.arrives // 2, request.arrives - 1):
        if 0 <= fewer < request.arrives:
            yield replace(request, arrives=fewer)
    length = len(request.prompt)
    for shorter in (1, length // 2, length - 8, length - 1):
        if 0 < shorter < length:
            yield replace(request, prompt=request.prompt[:shorter])


def _at_most(params: dict[str, Any], most: int) -> dict[str, Any]:
    if params.get("min_tokens", 0) > most:
        params = {**params, "min_tokens": most}
    return {**params, "max_tokens": most}


def _simpler_engines(engine: Engine) -> Iterator[Engine]:
    """Engines with fewer options."""
    for part in ("own", "adadecode", "arguments"):
        options: dict[str, Any] = getattr(engine, part)
        for name in options:
            if name not in _KEPT:
                fewer = {key: options[key] for key in options if key != name}
                yield replace(engine, **{part: fewer})
    cap = engine.adadecode.get("max_early_predictions", 1)
    for fewer_drafts in (1, cap // 2):
        if 0 < fewer_drafts < cap:
            smaller = {**engine.adadecode, "max_early_predictions": fewer_drafts}
            yield replace(engine, adadecode=smaller)
