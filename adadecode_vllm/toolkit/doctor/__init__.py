# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: what stops or slows a server, and what speed to expect.

Nothing here needs vLLM, torch or a loaded model: what is missing is what it reports.
"""
