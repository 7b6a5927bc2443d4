"""`convert`: an adapter as safetensors, which can hold nothing but tensors."""

from __future__ import annotations

import argparse

import torch

from ..errors import WrongArgument
from ..mapping import load_adapter
from ..saving import write_tensors
from ..tensor_files import read_metadata
from .options import say


def convert_adapter(options: argparse.Namespace) -> int:
    """Read, check and write an adapter."""
    if options.out.suffix != ".safetensors":
        raise WrongArgument(f"OUT is {options.out}, expected a name that ends in .safetensors.")
    if options.out.exists() and not options.force:
        raise WrongArgument(f"{options.out} is there already; --force writes over it.")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    state = load_adapter(options.file, dtype=dtype).state_dict()
    metadata = {**read_metadata(options.file), "format": "pt"}
    write_tensors(options.out, state, metadata)
    parameters = sum(value.numel() for value in state.values())
    say(f"{options.out}: {len(state)} tensors, {parameters:,} parameters, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0
