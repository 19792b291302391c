# SPDX-License-Identifier: Apache-2.0
"""Two routes of vLLM's API server: the page, and the figures it asks for."""

from __future__ import annotations

import hashlib
import os
import re
import time
from argparse import Namespace
from base64 import b64encode
from importlib.resources import files
from threading import Lock
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from adadecode_vllm import __version__
from adadecode_vllm.config import AdaDecodeConfig, engine_config
from adadecode_vllm.engine.finished_requests import RECENT
from adadecode_vllm.engine.metric_samples import counted_here
from adadecode_vllm.live.figures import Lately, figures, request_figures

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

PAGE = "/adadecode"
STATS = "/adadecode/stats"


class LiveEndpoint:
    """What vLLM's group ``vllm.endpoint_plugins`` asks for.

    Attributes:
        name: That VLLM_PLUGINS allows.
        required_tasks: Servers of these only.
    """

    name = "adadecode"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def __init__(self) -> None:
        """Read the page once."""
        html = (files("adadecode_vllm.live") / "page.html").read_text(encoding="utf-8")
        self._html = html
        self._headers = {
            "Content-Security-Policy": _policy(html),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        self._config: AdaDecodeConfig | None = None
        self._server: dict[str, Any] = {}
        self._lately = Lately()
        self._reading = Lock()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; see vLLM."""
        for path, answer in ((PAGE, self.page), (STATS, self.stats)):
            app.add_api_route(
                path, answer, methods=["GET"], response_model=None, tags=["adadecode"]
            )

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Learn what is served; see vLLM."""
        if engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        self._config = engine_config(vllm_config)
        model_config = vllm_config.model_config
        self._server = {
            "model": args.served_model_name or [args.model],
            "layers": model_config.get_total_num_hidden_layers(),
            "device": vllm_config.device_config.device_type,
            "api_servers": vllm_config.parallel_config._api_process_count,
            "engines": vllm_config.parallel_config.data_parallel_size,
        }

    def page(self) -> HTMLResponse:
        """The page; it holds nothing that anybody sent."""
        return HTMLResponse(self._html, headers=self._headers)

    # Not a coroutine: with several API servers the counters are in files. So several
    # threads may ask, and an older reading must not be compared after a newer one.
    def stats(self) -> JSONResponse:
        """All figures; counters of all API servers, requests of this one."""
        if self._config is None:
            return _refusal(
                "This server was started without --plugin adadecode, or with "
                '"enabled": false.'
            )
        with self._reading:
            counted = counted_here()
            if counted is None:
                return _refusal("This server was started with --disable-log-stats.")
            lately = self._lately.since(time.monotonic(), counted)
        host_times = self._server["device"] == "cpu"
        return JSONResponse(
            {
                "version": __version__,
                "process": os.getpid(),
                "time": time.time(),
                **self._server,
                "options": self._config.model_dump(mode="json"),
                "since_start": figures(counted, None, host_times=host_times),
                "lately": None
                if lately is None
                else figures(lately[1], lately[0], host_times=host_times),
                "requests": [request_figures(request) for request in RECENT.newest()],
            },
            headers={"Cache-Control": "no-store"},
        )


def _refusal(sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=404)


def _policy(html: str) -> str:
    """Let a browser run the page's own script and style, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; "
        f"style-src {hashes('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
