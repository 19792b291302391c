# SPDX-License-Identifier: Apache-2.0
"""The page `/adadecode` of a server, through vLLM's own endpoint plugins.

``figures`` turns counters into what the page shows, ``endpoint`` serves it as JSON and
``page.html`` draws it in the browser. vLLM loads the endpoint in its API servers only,
and only where VLLM_PLUGINS names it.
"""
