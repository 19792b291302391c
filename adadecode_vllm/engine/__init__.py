# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM.

``arguments`` and ``refusals`` stand at start-up; ``segments``, ``batch``,
``exit_scorer`` and ``vllm_executor`` run the method on vLLM's layers, attention
metadata and paged KV cache; workers, runners, ``proposer`` (Model Runner V1),
``speculator`` (V2) and ``scheduler`` are adapters. The worker attaches its counters to
a step's outcome (``outcomes``), the scheduler sends what was added since the last step
(``counter_report``), and vLLM's loggers in the API server, extended by
``patches/stat_loggers.py``, add that up (``metric_loggers``). Only what was added
travels, so that several API servers, each of which sees some of the steps, sum up to
the whole.
"""
