# SPDX-License-Identifier: Apache-2.0
"""Changes to vLLM that no public hook or subclass can make.

Installed as `adadecode_vllm.patches`. A patch is the last resort; each is one module
that makes one change, and its docstring says

- the symptom without it and why no hook or subclass serves,
- a link to the upstream code or issue,
- the condition under which the module can be deleted.

The module defines `install() -> None`, which keeps the original, logs what it changed,
and is idempotent: vLLM may load a plugin more than once in one process. If the place to
change does not look as expected it raises instead of patching blindly. A test covers
the changed behaviour, and another fails once upstream makes the patch unnecessary.
"""
