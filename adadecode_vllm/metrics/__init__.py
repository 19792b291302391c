# SPDX-License-Identifier: Apache-2.0
"""The method's counters on their way to those who watch a server.

The worker attaches its counters to a step's outcome, the scheduler sends what was added
since the last step (``report``), vLLM's loggers in the API server, extended by
``patches/stat_loggers.py``, add that up (``loggers``), and ``adadecode stats`` reads it
from ``/metrics`` (``snapshot``, ``command``). Only what was added travels, so that
several API servers, each of which sees some of the steps, sum up to the whole.
"""
