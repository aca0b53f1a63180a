"""What a call can fail with: one exception for each reason that the service names.

Each error of the service carries a `google.rpc.ErrorInfo`; `restore` turns it back into its exception. Errors
that never reached a worker (no connection, the client's own deadline) have no reason and are told by status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2
from grpc_status import rpc_status

from apiary.v1 import error_reason_pb2

DOMAIN = "apiary"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request and what is wrong with it."""

    field: str
    description: str


class ApiaryError(Exception):
    """Base of all errors of a call.

    Attributes:
        message: what was wrong, what was allowed, what to do.
        code: the gRPC status.
        reason: the `apiary.v1.ErrorReason` without its prefix, or None if the worker named none.
        metadata: the numbers behind the reason.
        retry_after: seconds after which a retry makes sense, or None.
        resource: the full name of the resource in question, or None.
        violations: the fields in question.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        resource: str | None = None,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.resource = resource
        self.violations = violations


class InvalidField(ApiaryError):
    """Fields of the request are missing, malformed or out of range; see `violations`."""


class FieldNotImplemented(InvalidField):
    """A field that the API has and this worker cannot honour yet; see `violations`."""


class MalformedMessage(ApiaryError):
    """The worker could not parse the request."""


class MethodNotImplemented(ApiaryError):
    """A method that the API has and this worker does not offer (yet)."""


class SessionNotFound(ApiaryError):
    """The session is unknown, expired or another tenant's; see `resource`."""


class ModelNotFound(ApiaryError):
    """The worker serves another model; see `resource`."""


class SessionExists(ApiaryError):
    """A session of that name exists already; see `resource`."""


class SessionBusy(ApiaryError):
    """Another turn of the session is in flight."""


class ContextFull(ApiaryError):
    """The turn cannot fit the session's bound (policy `full`); `metadata` has the numbers."""


class QueueFull(ApiaryError):
    """Too many requests wait, and this tenant's are the most for its weight; try again after
    `retry_after`."""


class BudgetExhausted(ApiaryError):
    """No cache memory is free; try again after `retry_after`."""


class Unavailable(ApiaryError):
    """No worker can be reached, or the connection broke."""


class Draining(Unavailable):
    """The worker is shutting down and takes no new turns."""


class DeadlineExceeded(ApiaryError):
    """The call's `timeout` passed, or would have before the first token; a turn was rolled back."""


class Cancelled(ApiaryError):
    """The call was cancelled, or its session was deleted while the turn ran."""


class ReaderStalled(ApiaryError):
    """The deltas were not read for the worker's stall limit; the turn was rolled back."""


class SnapshotRefused(ApiaryError):
    """The snapshot to import is broken, not signed by the worker's key, or of another model."""


class Internal(ApiaryError):
    """A fault of the worker; its log names the `incident`."""

    @property
    def incident(self) -> str | None:
        """The incident's id in the worker's log."""
        return self.metadata.get("incident")


_REASON = error_reason_pb2.ErrorReason

BY_REASON: Mapping[str, type[ApiaryError]] = {
    _REASON.Name(number).removeprefix("ERROR_REASON_"): kind
    for number, kind in {
        _REASON.ERROR_REASON_INVALID_FIELD: InvalidField,
        _REASON.ERROR_REASON_MALFORMED_MESSAGE: MalformedMessage,
        _REASON.ERROR_REASON_FIELD_NOT_IMPLEMENTED: FieldNotImplemented,
        _REASON.ERROR_REASON_METHOD_NOT_IMPLEMENTED: MethodNotImplemented,
        _REASON.ERROR_REASON_SESSION_NOT_FOUND: SessionNotFound,
        _REASON.ERROR_REASON_MODEL_NOT_FOUND: ModelNotFound,
        _REASON.ERROR_REASON_SESSION_EXISTS: SessionExists,
        _REASON.ERROR_REASON_SESSION_BUSY: SessionBusy,
        _REASON.ERROR_REASON_CONTEXT_FULL: ContextFull,
        _REASON.ERROR_REASON_QUEUE_FULL: QueueFull,
        _REASON.ERROR_REASON_BUDGET_EXHAUSTED: BudgetExhausted,
        _REASON.ERROR_REASON_DEADLINE_EXCEEDED: DeadlineExceeded,
        _REASON.ERROR_REASON_CANCELLED: Cancelled,
        _REASON.ERROR_REASON_READER_STALLED: ReaderStalled,
        _REASON.ERROR_REASON_DRAINING: Draining,
        _REASON.ERROR_REASON_INTERNAL: Internal,
        _REASON.ERROR_REASON_SNAPSHOT_REFUSED: SnapshotRefused,
    }.items()
}

# Where no reason is named: gRPC itself answered, or a proxy, or a worker newer than this client.
_BY_CODE: Mapping[grpc.StatusCode, type[ApiaryError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: MethodNotImplemented,
    grpc.StatusCode.INTERNAL: Internal,
}


def restore(error: grpc.RpcError) -> ApiaryError:
    """Turn the failure of a call, synchronous or asyncio, into the exception that its details name."""
    code = error.code()
    info = details_pb.ErrorInfo()
    retry = details_pb.RetryInfo()
    resource = details_pb.ResourceInfo()
    bad = details_pb.BadRequest()
    for detail in _status(error).details:
        for kind in (info, retry, resource, bad):
            detail.Unpack(kind)
    reason = info.reason if info.domain == DOMAIN else None
    kind_of_error = BY_REASON.get(reason or "") or _BY_CODE.get(code, ApiaryError)
    return kind_of_error(
        error.details() or code.name,
        code=code,
        reason=reason,
        metadata=info.metadata if reason else None,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        resource=resource.resource_name or None,
        violations=tuple(Violation(item.field, item.description) for item in bad.field_violations),
    )


def _status(error: grpc.RpcError) -> status_pb2.Status:
    try:
        return rpc_status.from_call(error) or status_pb2.Status()
    except ValueError:  # the details contradict the status: a proxy rewrote it, so believe the status
        return status_pb2.Status()
