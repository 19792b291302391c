# SPDX-License-Identifier: Apache-2.0
"""Python imports this at start-up where its directory is on PYTHONPATH."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "triton_backend.py"
_spec = importlib.util.spec_from_file_location("triton_backend", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
_module.install()
