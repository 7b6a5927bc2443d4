"""Progress in the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm


class Bars:
    """A progress bar for each stage; give its `show` to the pipeline as progress."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: tqdm | None = None
        self._finished = 0
        self._began = time.monotonic()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int) -> None:
        """One step of one stage is over."""
        if done == 0:
            self.__exit__(None, None, None)
            label = f"picture {min(self._finished + 1, self._total)} of {self._total}{self._left()}: {stage}"
            self._bar = tqdm(total=total, desc=label, unit="step", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def _left(self) -> str:
        """How long the rest will take, by what took part so far."""
        rest = self._total - self._finished
        if not self._finished or not rest:
            return ""
        seconds = round((time.monotonic() - self._began) / self._finished * rest)
        return f", about {seconds // 60}:{seconds % 60:02d} left"

    def finished(self, pictures: int = 1) -> None:
        """So many pictures are done."""
        self._finished += pictures
