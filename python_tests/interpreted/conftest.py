"""These tests run where TRITON_INTERPRET=1: python_tests/test_triton.py starts them so."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
