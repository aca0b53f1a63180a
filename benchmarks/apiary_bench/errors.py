"""What can go wrong in a benchmark, in words for who runs it."""

from __future__ import annotations

from apiary_server.errors import ApiaryError


class BenchError(ApiaryError):
    """Base of the benchmarks' errors."""


class DataError(BenchError):
    """A file of the evaluation data is missing or malformed; the message says which, and where."""


class SettingsError(BenchError):
    """A benchmark was asked for something that it does not know or cannot do."""


class LoadError(BenchError):
    """A turn that prepares a load was not completed, so there is nothing to measure."""


class VoidError(BenchError):
    """What was measured is not what it was to be, so its times say nothing; the message says why."""
