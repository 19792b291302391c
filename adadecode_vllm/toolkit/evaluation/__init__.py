# SPDX-License-Identifier: Apache-2.0
"""What heads will do before they are served.

``measure`` looks at each exit on held-out text, ``calibration`` relates its confidence
to how often it is right, ``simulate`` plays the engine's cycles on the model's own
answers, and ``cost`` turns them into a predicted speedup, for which ``row_costs``
measures what rows cost here. ``defaults`` plays an engine without options.
"""
