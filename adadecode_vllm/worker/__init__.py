# SPDX-License-Identifier: Apache-2.0
"""Worker classes, one module a platform.

They choose the model runner and answer for its counters. Each module is imported on its
own platform only: vLLM's CPU worker replaces parts of torch.cuda when it is imported.
"""
