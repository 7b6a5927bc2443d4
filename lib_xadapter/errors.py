"""Errors that users can mend."""


class XAdapterError(Exception):
    """Something the user can mend: the message says what is wrong, with which file, key or option."""


class WrongFile(XAdapterError):
    """A file that is missing, unreadable, cut off, or not what it was named as."""


class WrongArgument(XAdapterError):
    """An argument that is unknown, of the wrong type or out of range, or that names a model nobody has."""


class DoesNotFit(XAdapterError):
    """Models that do not belong together: mapping layers made for other channel counts, an SDXL base, …"""


class UnplannedLevel(XAdapterError):
    """A sampler asked for another noise level than was planned: somebody else has changed it."""


def first_line(error: Exception) -> str:
    """Of an exception's message; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
