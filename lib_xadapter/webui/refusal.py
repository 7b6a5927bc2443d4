"""How a job that cannot go on ends in the WebUI."""

from __future__ import annotations

from ..errors import XAdapterError

BAD_REQUEST = 422


class Refusal(Exception):
    """Ends a job with its message: red text on the page, status 422 over REST.

    The WebUI's API reads `status_code` and `detail` from the exception's own attributes (`api.py`, handle_exception).
    """

    def __init__(self, problem: XAdapterError) -> None:
        super().__init__(str(problem))
        self.status_code = BAD_REQUEST
        self.detail = str(problem)
