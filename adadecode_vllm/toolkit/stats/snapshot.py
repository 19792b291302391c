# SPDX-License-Identifier: Apache-2.0
"""What a server's ``/metrics`` says at one moment."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from adadecode_vllm.engine.metric_names import (
    CONFIG_INFO,
    DROPPED,
    PER_EXIT,
    PREFIX,
    TOTALS,
)
from adadecode_vllm.errors import AdaDecodeError

_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Snapshot:
    """Counters of a server, summed over its engines.

    Attributes:
        time: When they were read, in seconds of the monotonic clock.
        per_exit: By exit layer, each counter of
            :data:`adadecode_vllm.engine.metric_names.PER_EXIT` by its key.
        totals: Each counter of :data:`adadecode_vllm.engine.metric_names.TOTALS`.
        dropped: Dropped tokens, by reason.
        options: The engine's options.
    """

    time: float
    per_exit: dict[int, dict[str, float]]
    totals: dict[str, float]
    dropped: dict[str, float]
    options: dict[str, str] = field(default_factory=dict)

    def since(self, earlier: Snapshot) -> Snapshot:
        """What was counted between two moments; ``time`` is the seconds between."""
        return Snapshot(
            time=self.time - earlier.time,
            per_exit={
                layer: _less(counted, earlier.per_exit.get(layer, {}))
                for layer, counted in self.per_exit.items()
            },
            totals=_less(self.totals, earlier.totals),
            dropped=_less(self.dropped, earlier.dropped),
            options=self.options,
        )

    @property
    def restarted(self) -> bool:
        """Whether a difference shows that the server counted from zero again."""
        return any(value < 0 for value in self.totals.values())


def metrics_url(url: str) -> str:
    """The address of a server's metrics.

    Args:
        url: The server's, such as ``http://localhost:8000``, ``localhost:8000`` or the
            whole address.

    Raises:
        AdaDecodeError: If it is not an address of HTTP.
    """
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise AdaDecodeError(
            f"URL {url!r}: not the address of a server. Give one such as "
            "http://localhost:8000."
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/metrics"):
        path = path.removesuffix("/v1") + "/metrics"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def read(url: str) -> Snapshot:
    """Read a server's counters.

    Args:
        url: From :func:`metrics_url`.

    Raises:
        AdaDecodeError: If it does not answer, or not with AdaDecode's metrics.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        raise AdaDecodeError(
            f"URL {url}: the server answers {error.code} ({error.reason}). Give the "
            "address of a vLLM server."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise AdaDecodeError(
            f"URL {url}: no answer ({reason}). Start the server, or correct the "
            "address."
        ) from None
    return parse(text, time.monotonic(), url)


def parse(text: str, now: float, url: str) -> Snapshot:
    """Read metrics in Prometheus's text format.

    Args:
        text: The metrics.
        now: When they were read.
        url: Where; for the message.

    Raises:
        AdaDecodeError: If AdaDecode's are not among them.
    """
    samples = list(_samples(text, url))
    layers = {
        int(labels["exit_layer"]) for _, labels, _ in samples if "exit_layer" in labels
    }
    if not layers:
        raise AdaDecodeError(
            f"URL {url}: AdaDecode's metrics are not there. Start the server with "
            "--plugin adadecode --adadecode-heads DIR and without --disable-log-stats."
        )
    per_exit_keys = {name: key for key, (name, _) in PER_EXIT.items()}
    total_keys = {name: key for key, (name, _) in TOTALS.items()}
    per_exit = {layer: dict.fromkeys(PER_EXIT, 0.0) for layer in sorted(layers)}
    totals = dict.fromkeys(TOTALS, 0.0)
    dropped: defaultdict[str, float] = defaultdict(float)
    options: dict[str, str] = {}
    for full_name, labels, value in samples:
        name = full_name.removesuffix("_total")
        if name in per_exit_keys:
            per_exit[int(labels["exit_layer"])][per_exit_keys[name]] += value
        elif name in total_keys:
            totals[total_keys[name]] += value
        elif name == DROPPED[0]:
            dropped[labels["reason"]] += value
        elif name == CONFIG_INFO[0]:
            options = labels
    return Snapshot(now, per_exit, totals, dict(dropped), options)


def _samples(text: str, url: str) -> Iterable[tuple[str, dict[str, str], float]]:
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    yield sample.name.removeprefix(PREFIX), sample.labels, sample.value
    except ValueError:
        raise AdaDecodeError(
            f"URL {url}: the answer is not in Prometheus's text format. Give the "
            "address of a vLLM server."
        ) from None


def _less(counted: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: value - earlier.get(name, 0.0) for name, value in counted.items()}
