# SPDX-License-Identifier: Apache-2.0
"""Training of exit heads by distillation from a frozen model.

``objective`` turns cached states into losses and gradients, chunk by chunk; ``trainer``
is the loop. ``probe`` chooses exit layers, ``draft_vocabulary`` ranks the tokens of the
text. Everything that meets a user is in ``command``.
"""
