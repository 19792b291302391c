# SPDX-License-Identifier: Apache-2.0
"""A differential fuzzer: random engines and requests, plain vLLM and AdaDecode.

    python -m tests.reliability.differential --engines 60 --requests 50 --seed 0

A seed draws an engine and streams of requests (`draw.py`). Both engines run in
processes of their own (`host.py`) and are stepped by hand, so that requests arrive and
are aborted in the middle of others (`drive.py`). What they answer must be the same
(`compare.py`), and at the end nothing may be left (`books.py`). A failure is shrunk to
a script that reproduces it (`shrink.py`, `fuzz.py`). `prove.py` puts known defects back
and tells how soon they are found.
"""
