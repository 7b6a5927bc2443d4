"""A call that waits at certain places until it is asked to go on: the base's pipeline beside the upgraded model's.

Both pipelines have a loop of their own. So the base's runs on a thread that is only ever awake while the caller waits
for it: two threads, one at a time.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from ..errors import XAdapterError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class CallClosed(BaseException):
    """Nobody asks any more: raised inside the call, so that its context managers close."""


class PausedCall(Generic[Question, Answer]):
    """Two sides that hand the work to and fro.

    The call's side answers what it was asked and takes the next question in one go; the caller's side asks.
    """

    def __init__(self, call: Callable[[PausedCall[Question, Answer]], object]) -> None:
        self._call = call
        self._questions: SimpleQueue[tuple[Question, torch.cuda.Stream | None] | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer | _Ended] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, question: Question) -> Answer:
        """The call's answer. Whatever is raised in the call is raised here."""
        if self._thread is None:
            run = _with_state_of_this_thread(self._run)
            self._thread = threading.Thread(target=run, name="X-Adapter: base", daemon=True)
            self._thread.start()
        self._questions.put((question, _stream()))
        answer = self._answers.get()
        if isinstance(answer, _Ended):
            raise answer.error or XAdapterError("The base's pipeline made fewer model evaluations than it was to make.")
        return answer

    def first(self) -> Question:
        """On the call's side: the first question."""
        return self._next()

    def answer(self, answer: Answer) -> Question:
        """On the call's side: answer, and wait for the next question.

        Raises:
            CallClosed: there is none.
        """
        self._answers.put(answer)
        return self._next()

    def close(self) -> None:
        """End the call, wherever it is."""
        if self._thread is not None:
            self._questions.put(None)
            self._thread.join()

    def _next(self) -> Question:
        found = self._questions.get()
        if found is None:
            raise CallClosed
        question, stream = found
        if stream is not None:
            torch.cuda.set_stream(stream)
        return question

    def _run(self) -> None:
        try:
            self._call(self)
        except CallClosed:
            self._answers.put(_Ended(None))
        except BaseException as error:  # it belongs to the caller's thread
            self._answers.put(_Ended(error))
        else:
            self._answers.put(_Ended(None))


class _Ended:
    """The call is over."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def paused_call(call: Callable[[PausedCall[Question, Answer]], object]) -> Iterator[PausedCall[Question, Answer]]:
    """While open, the call can be asked."""
    paused = PausedCall(call)
    try:
        yield paused
    finally:
        paused.close()


def _stream() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _with_state_of_this_thread(run: Callable[[], None]) -> Callable[[], None]:
    """What torch keeps for each thread: grad mode, inference mode, autocast, the current GPU."""
    context = contextvars.copy_context()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocasts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def with_state() -> None:
        with ExitStack() as state:
            state.enter_context(torch.inference_mode(inference))
            state.enter_context(torch.set_grad_enabled(grad and not inference))
            for kind, dtype in autocasts:
                state.enter_context(torch.autocast(kind, dtype))
            if gpu is not None:
                torch.cuda.set_device(gpu)
            run()

    return lambda: context.run(with_state)
