"""What makes the CPU wait for a GPU, noticed where there is none: under FakeTensorMode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
"""Operations whose result the CPU has to know."""


class Waits(TorchDispatchMode):
    """Writes down every operation that waits: numbers read back, and copies between ordinary memory and a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in READ_BACK and any(tensor.device.type == "cuda" for tensor in tensors):
            self.seen.append(name)
        result = function(*args, **kwargs)
        copies = [args[0], args[1]] if name == "copy_" else [args[0], result] if name == "_to_copy" else []
        places = {tensor.device.type for tensor in copies if isinstance(tensor, Tensor)}
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))
        if len(places) > 1 and waits:
            self.seen.append(f"{name} between {' and '.join(sorted(places))}")
        if name == "index" and any(tensor.device.type == "cpu" for tensor in tensors[1:]):
            self.seen.append("index by numbers in ordinary memory")
        return result


def on_a_gpu() -> torch.device:
    """The device of fake tensors."""
    return torch.device("cuda", 0)
