# SPDX-License-Identifier: Apache-2.0
"""What a server's ``/metrics`` says at one moment."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from adadecode_vllm.config import format_value
from adadecode_vllm.engine.metric_samples import Counted, Sample, sum_samples
from adadecode_vllm.errors import AdaDecodeError

_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Snapshot:
    """Counters of a server at one moment, or between two.

    Attributes:
        time: When they were read, in seconds of the monotonic clock, or the seconds
            between.
        counted: The counters.
    """

    time: float
    counted: Counted

    def since(self, earlier: Snapshot) -> Snapshot:
        """What was counted between two moments; ``time`` is the seconds between."""
        return Snapshot(self.time - earlier.time, self.counted.since(earlier.counted))


def metrics_url(url: str) -> str:
    """The address of a server's metrics.

    Args:
        url: The server's, such as ``http://localhost:8000``, ``localhost:8000`` or the
            whole address.

    Raises:
        AdaDecodeError: If it is not an address of HTTP.
    """
    refusal = AdaDecodeError(
        f"URL {url!r}: not the address of a server. Give one such as "
        "http://localhost:8000."
    )
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    except ValueError as error:  # a bracket that is not closed
        raise refusal from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise refusal
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
    except http.client.HTTPException as error:
        # It ends in the middle, as of a server that ends, or is not HTTP.
        raise AdaDecodeError(
            f"URL {url}: no whole answer ({format_value(error)}). Start the server "
            "again, or correct the address."
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
    counted = sum_samples(_samples(text, url))
    if counted is None:
        raise AdaDecodeError(
            f"URL {url}: AdaDecode's metrics are not there. Start the server with "
            "--plugin adadecode --adadecode-heads DIR and without --disable-log-stats."
        )
    return Snapshot(now, counted)


def _samples(text: str, url: str) -> Iterable[Sample]:
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError:
        raise AdaDecodeError(
            f"URL {url}: the answer is not in Prometheus's text format. Give the "
            "address of a vLLM server."
        ) from None
