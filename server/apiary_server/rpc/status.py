"""The one table from domain errors to gRPC statuses, with `google.rpc` details."""

from __future__ import annotations

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from apiary.v1.error_reason_pb2 import ErrorReason
from apiary_server import errors

DOMAIN = "apiary"

# gRPC refuses metadata above 8 KiB. The message goes out twice: percent-encoded (up to 3 bytes a byte) and,
# with the details, in base64 (4 bytes for 3).
_MESSAGE_BYTES = 600
_FIELD_BYTES = 200
_DETAILS_BYTES = 3600

TABLE: dict[type[errors.ApiaryError], tuple[grpc.StatusCode, ErrorReason.ValueType]] = {
    errors.InvalidField: (grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_INVALID_FIELD),
    errors.MalformedMessage: (grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_MESSAGE),
    errors.MethodNotImplemented: (
        grpc.StatusCode.UNIMPLEMENTED,
        ErrorReason.ERROR_REASON_METHOD_NOT_IMPLEMENTED,
    ),
    errors.SessionNotFound: (grpc.StatusCode.NOT_FOUND, ErrorReason.ERROR_REASON_SESSION_NOT_FOUND),
    errors.ModelNotFound: (grpc.StatusCode.NOT_FOUND, ErrorReason.ERROR_REASON_MODEL_NOT_FOUND),
    errors.SessionExists: (grpc.StatusCode.ALREADY_EXISTS, ErrorReason.ERROR_REASON_SESSION_EXISTS),
    errors.SessionBusy: (grpc.StatusCode.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_SESSION_BUSY),
    errors.ContextFull: (grpc.StatusCode.FAILED_PRECONDITION, ErrorReason.ERROR_REASON_CONTEXT_FULL),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_QUEUE_FULL),
    errors.BudgetExhausted: (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_BUDGET_EXHAUSTED),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, ErrorReason.ERROR_REASON_DRAINING),
    errors.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED),
    errors.Cancelled: (grpc.StatusCode.CANCELLED, ErrorReason.ERROR_REASON_CANCELLED),
    errors.ReaderStalled: (grpc.StatusCode.ABORTED, ErrorReason.ERROR_REASON_READER_STALLED),
    errors.SnapshotRefused: (grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_SNAPSHOT_REFUSED),
    errors.Internal: (grpc.StatusCode.INTERNAL, ErrorReason.ERROR_REASON_INTERNAL),
}


def is_known(error: errors.ApiaryError) -> bool:
    """Whether callers may see such errors; those of the start-up, for example, have no place in `TABLE`."""
    return isinstance(error, tuple(TABLE))


def to_status(error: errors.ApiaryError) -> grpc.Status:
    """The gRPC status of a known error, small enough for gRPC's metadata limit."""
    code, reason = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    status = status_pb2.Status(code=code.value[0], message=_clip(error.message, _MESSAGE_BYTES))
    info = error_details_pb2.ErrorInfo(
        domain=DOMAIN,
        reason=ErrorReason.Name(reason).removeprefix("ERROR_REASON_"),
        metadata={key: _clip(value, _FIELD_BYTES) for key, value in error.metadata.items()},
    )
    for detail in (info, *_details(error)):
        status.details.add().Pack(detail)
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def _details(error: errors.ApiaryError) -> list[Message]:
    match error:
        case errors.InvalidField():
            return [_bad_request(error)]
        case errors.NotFound():
            return [
                error_details_pb2.ResourceInfo(
                    resource_type=error.resource_type,
                    resource_name=_clip(error.resource, _FIELD_BYTES),
                    description=_clip(error.message, _FIELD_BYTES),
                )
            ]
        case errors.RetryLater():
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromMilliseconds(round(error.retry_after * 1000))
            return [info]
    return []


def _bad_request(error: errors.InvalidField) -> error_details_pb2.BadRequest:
    """As many of the violations as fit; the first always does."""
    bad = error_details_pb2.BadRequest()
    for field, why in error.violations:
        bad.field_violations.add(field=_clip(field, _FIELD_BYTES), description=_clip(why, _FIELD_BYTES))
        if bad.ByteSize() > _DETAILS_BYTES - _MESSAGE_BYTES - 3 * _FIELD_BYTES:
            break
    return bad


def _clip(text: str, limit: int) -> str:
    """The text, cut to at most `limit` bytes of UTF-8 without splitting a character."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "…"
