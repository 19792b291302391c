# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on machines without a GPU, for tests only.

V2's kernels are written in Triton. Triton's interpreter runs them in Python, in about
40 ms an engine step on the demo model; all it lacks is a backend that says it is there.
`EngineProcess` starts a process in which one does. The rest of the tests stays in a
process without it, where vLLM chooses Model Runner V1 as it does on users' CPUs.
"""
