"""Everything here is skipped where the extra 'train' is not installed."""

from __future__ import annotations

import os

import pytest
from torch import nn

for needed in ("diffusers", "accelerate", "datasets"):
    pytest.importorskip(needed, reason="needs the extra 'train'")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def base() -> nn.Module:
    """A base's UNet as small as can be."""
    from .tiny_pair import tiny_base

    return tiny_base()


@pytest.fixture(scope="session")
def upgraded() -> nn.Module:
    """An upgraded model's."""
    from .tiny_pair import tiny_upgraded

    return tiny_upgraded()
