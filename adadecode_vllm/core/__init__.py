# SPDX-License-Identifier: Apache-2.0
"""The method itself: segments, drafting, the ledger and resumption.

Nothing in this package knows vLLM's model runners. ``ledger``, ``policy``,
``drafting``, ``resume``, ``stats`` and ``states`` know nothing of vLLM at all; they
reach the model through :class:`~adadecode_vllm.core.executor.SegmentExecutor`.
``segments``, ``batch`` and ``vllm_executor`` implement that interface with vLLM's
layers, attention metadata and paged KV cache.

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
