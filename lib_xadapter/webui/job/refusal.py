"""How a job that cannot go on ends in the WebUI."""

from __future__ import annotations

from ...errors import DoesNotFit, WrongArgument, WrongFile, XAdapterError

BAD_REQUEST = 422
SERVER_ERROR = 500


class Refusal(Exception):
    """Ends a job with its message: red text on the page, over REST status 422 for what the request can mend, else 500.

    The WebUI's API reads `status_code` and `detail` from the exception's own attributes (`api.py`, handle_exception).
    """

    def __init__(self, problem: XAdapterError) -> None:
        super().__init__(str(problem))
        mendable = isinstance(problem, (WrongArgument, DoesNotFit, WrongFile))
        self.status_code = BAD_REQUEST if mendable else SERVER_ERROR
        self.detail = str(problem)
