"""Everything here is skipped where diffusers is not installed."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")
