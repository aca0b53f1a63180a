"""What can go wrong, in the service's own words. No gRPC here: `rpc/status.py` maps each to a status."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apiary_server.sessions.info import RebuildReason


class ApiaryError(Exception):
    """Base of all errors that a caller may see. `metadata` goes into `ErrorInfo.metadata`."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidField(ApiaryError):
    """Fields of the request that are missing, malformed or out of range."""

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {why}" for field, why in violations))
        self.violations = violations


class MalformedMessage(ApiaryError):
    """Bytes that are not the message that the method takes."""


class MethodNotImplemented(ApiaryError):
    """A method that the API has and this server does not offer yet."""


class NotFound(ApiaryError):
    """Base of the errors about resources: `resource` is its full name."""

    resource_type = ""

    def __init__(self, resource: str, message: str) -> None:
        super().__init__(message)
        self.resource = resource


class SessionNotFound(NotFound):
    """Unknown, expired or foreign: the three cannot be told apart from outside."""

    resource_type = "apiary.v1.Session"

    def __init__(self, resource: str) -> None:
        super().__init__(resource, f"no session {resource!r}: unknown, expired or another tenant's")


class ModelNotFound(NotFound):
    """This worker serves another model."""

    resource_type = "apiary.v1.Model"


class SessionExists(NotFound):
    """A session of that name exists already (for this tenant)."""

    resource_type = "apiary.v1.Session"

    def __init__(self, resource: str) -> None:
        super().__init__(resource, f"session {resource!r} exists already")


class SessionBusy(ApiaryError):
    """Another turn of the session is in flight."""


class ContextFull(ApiaryError):
    """The turn cannot fit the bound of a cache that evicts nothing."""


class SnapshotRefused(ApiaryError):
    """A snapshot that cannot be used; `reason` is a `RebuildReason`."""

    def __init__(self, why: str, reason: RebuildReason) -> None:
        super().__init__(f"the snapshot is refused: {why}", cause=reason.value)
        self.reason = reason


class RetryLater(ApiaryError):
    """Base of the errors that pass by themselves; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class QueueFull(RetryLater):
    """Too many requests wait, and this tenant's are the most for its weight."""


class BudgetExhausted(RetryLater):
    """No cache memory is free, and none can be freed now."""


class Draining(RetryLater):
    """The worker is shutting down and takes no new turns."""

    def __init__(
        self, message: str = "the worker is shutting down; try another", retry_after: float = 1.0
    ) -> None:
        super().__init__(message, retry_after)


class DeadlineExceeded(ApiaryError):
    """The deadline passed in queue, prefill or decode, or would have before the first token; the turn was
    rolled back."""


class Cancelled(ApiaryError):
    """The caller went away, or the session was deleted; the turn was rolled back."""


class ReaderStalled(ApiaryError):
    """The reader took nothing for the stall limit; the turn was rolled back."""


class Internal(ApiaryError):
    """A fault of ours; `incident` names the log line that has it whole."""

    def __init__(self, incident: str) -> None:
        super().__init__(f"internal error, incident {incident}; the turn was rolled back", incident=incident)
