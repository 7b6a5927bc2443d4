"""Tensors by key on disk: safetensors shards, each whole or not there, that several processes may write at once."""

from __future__ import annotations

import json
import logging
import os
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WrongFile
from ..saving import write_whole

logger = logging.getLogger(__name__)

ENTRIES_A_SHARD = 64
SUFFIX = ".safetensors"
KEYS = "keys"
"""Of a shard's metadata: a list of those that it holds."""

Entry = dict[str, Tensor]
"""Tensors that belong together, by name."""


@dataclass(frozen=True)
class _Where:
    shard: int
    row: int


class LatentCache:
    """A folder of shards.

    An entry is kept from `put` on, and on disk once its shard is full, after `flush`, or when the program ends. What a
    killed program had not written yet is made again.

    Args:
        folder: made where it is not there.

    Raises:
        WrongFile: it cannot be written to or holds a shard that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongFile(f"{folder} cannot be written to: {error.strerror}.") from error
        self._shards: list[str] = []
        self._known: set[str] = set()
        self._changed = -1
        self._where: dict[bytes, _Where] = {}
        self._waiting: dict[str, Entry] = {}
        self._look_again()
        # takes the dictionary, not the cache, which would then never be let go
        self._at_end = weakref.finalize(self, _write_shard, folder, self._waiting)

    def get(self, key: str) -> Entry | None:
        """What was put under a key, by whatever process; None where it is not there."""
        if key in self._waiting:
            return self._waiting[key]
        packed = bytes.fromhex(key)
        if packed not in self._where:
            self._look_again()
        where = self._where.get(packed)
        return None if where is None else self._read(where)

    def put(self, key: str, entry: Mapping[str, Tensor]) -> None:
        """Keep an entry; `key` is a hash in hexadecimal digits."""
        self._waiting[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        if len(self._waiting) >= ENTRIES_A_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        _write_shard(self._folder, self._waiting)
        # the folder's time may be too coarse to tell
        self._changed = -1

    def _look_again(self) -> None:
        """Take in the shards that have come since."""
        changed = self._folder.stat().st_mtime_ns
        if changed == self._changed:
            return
        self._changed = changed
        for name in sorted(os.listdir(self._folder)):
            if name.endswith(SUFFIX) and not name.startswith(".") and name not in self._known:
                self._known.add(name)
                for row, key in enumerate(_keys(self._folder / name)):
                    self._where[bytes.fromhex(key)] = _Where(len(self._shards), row)
                self._shards.append(name)

    def _read(self, where: _Where) -> Entry:
        path = self._folder / self._shards[where.shard]
        start = f"{where.row}."
        try:
            with safe_open(path, framework="pt") as shard:
                names = [name for name in shard.keys() if name.startswith(start)]
                return {name.removeprefix(start): shard.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise WrongFile(f"{path} of the cache cannot be read: {error}.") from error


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as shard:
            return json.loads((shard.metadata() or {})[KEYS])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WrongFile(f"{path} is no shard of a cache or is cut off: delete it, it will be made again.") from error


def _write_shard(folder: Path, waiting: dict[str, Entry]) -> None:
    if not waiting:
        return
    tensors = {f"{row}.{name}": tensor for row, entry in enumerate(waiting.values()) for name, tensor in entry.items()}
    metadata = {KEYS: json.dumps(list(waiting))}
    # a name of its own: nobody writes over what another process wrote
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    write_whole(path, lambda to: to.write_bytes(safetensors.torch.save(tensors, metadata)))
    waiting.clear()
