# SPDX-License-Identifier: Apache-2.0
"""The method itself: drafting, the ledger of pending tokens, and resumption.

Nothing here imports vLLM or reads a file. The model is reached through
:class:`~adadecode_vllm.method.executor.SegmentExecutor`.

Index conventions, used everywhere:

* A *layer count* ``l`` means "after ``l`` decoder layers have run"; exits are layer
  counts. Segment ``j`` holds ``layers[bounds[j]:bounds[j + 1]]``.
* The *level* of a token is the number of segments that have run for it. With ``K``
  exits there are ``K + 1`` segments and ``K + 1`` means done.
* A token of level ``v`` has valid KV in the layers of segments ``0 .. v - 1`` and
  in no other layer.
* A request's *window* is its newest sampled token followed by its early predictions:
  at most ``max_early_predictions + 1`` tokens at consecutive positions.
"""
