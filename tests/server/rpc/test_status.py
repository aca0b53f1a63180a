"""The table of errors is complete, and each error has its documented details."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from apiary.v1.error_reason_pb2 import ErrorReason
from apiary_server import errors
from apiary_server.rpc import status
from apiary_server.sessions.info import RebuildReason

EXAMPLES: list[errors.ApiaryError] = [
    errors.InvalidField([("a.b", "too large"), ("c", "missing")]),
    errors.MalformedMessage("noise"),
    errors.MethodNotImplemented("later"),
    errors.SessionNotFound("sessions/a"),
    errors.ModelNotFound("models/a", "serves another"),
    errors.SessionExists("sessions/a"),
    errors.SessionBusy("busy"),
    errors.ContextFull("full", cached=1, prompt=2, bound=3),
    errors.QueueFull("full", retry_after=0.25),
    errors.BudgetExhausted("full", retry_after=5),
    errors.Draining("draining", retry_after=1.5),
    errors.DeadlineExceeded("too late"),
    errors.Cancelled("gone"),
    errors.ReaderStalled("stalled"),
    errors.SnapshotRefused("cut off", RebuildReason.SNAPSHOT_CORRUPT),
    errors.Internal("abc123"),
]
BASES = {errors.ApiaryError, errors.NotFound, errors.RetryLater}


def _details(error: errors.ApiaryError) -> tuple[status_pb2.Status, dict[str, object]]:
    converted = status.to_status(error)
    (key, value), *_ = converted.trailing_metadata
    assert key == "grpc-status-details-bin"
    whole = status_pb2.Status.FromString(value)
    assert whole.code == converted.code.value[0]
    unpacked = {}
    for packed in whole.details:
        name = packed.TypeName().rpartition(".")[2]
        unpacked[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(unpacked[name])
    return whole, unpacked


def test_every_error_has_a_place_and_an_example() -> None:
    kinds = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.ApiaryError) and kind not in BASES
    }
    assert set(status.TABLE) == kinds
    assert {type(example) for example in EXAMPLES} == kinds


def test_every_reason_has_one_error() -> None:
    reasons = [reason for _, reason in status.TABLE.values()]
    others = {ErrorReason.ERROR_REASON_UNSPECIFIED, ErrorReason.ERROR_REASON_FIELD_NOT_IMPLEMENTED}
    assert sorted(reasons) == sorted(set(ErrorReason.values()) - others)  # every field is implemented now


def test_only_faults_of_ours_are_internal() -> None:
    internal = [kind for kind, (code, _) in status.TABLE.items() if code is grpc.StatusCode.INTERNAL]
    assert internal == [errors.Internal]
    assert grpc.StatusCode.UNKNOWN not in {code for code, _ in status.TABLE.values()}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_details(error: errors.ApiaryError) -> None:
    whole, details = _details(error)
    assert whole.message == error.message
    info = details.pop("ErrorInfo")
    assert info.domain == "apiary"
    assert f"ERROR_REASON_{info.reason}" == ErrorReason.Name(status.TABLE[type(error)][1])
    assert dict(info.metadata) == error.metadata
    if isinstance(error, errors.InvalidField):
        violations = details.pop("BadRequest").field_violations
        assert [(one.field, one.description) for one in violations] == error.violations
    elif isinstance(error, errors.NotFound):
        resource = details.pop("ResourceInfo")
        assert (resource.resource_type, resource.resource_name) == (error.resource_type, error.resource)
        assert resource.resource_type in {"apiary.v1.Session", "apiary.v1.Model"}
    elif isinstance(error, errors.RetryLater):
        assert details.pop("RetryInfo").retry_delay.ToTimedelta().total_seconds() == error.retry_after
    assert details == {}


def test_a_subclass_has_its_parents_place() -> None:
    class Busier(errors.SessionBusy):
        """A kind of busy that the table does not name."""

    assert status.to_status(Busier("very")).code is grpc.StatusCode.FAILED_PRECONDITION
    assert status.is_known(Busier("very"))


def test_an_error_of_no_place_is_not_known() -> None:
    class StartUp(errors.ApiaryError):
        """Something that no caller sees."""

    assert not status.is_known(StartUp("no model"))


@pytest.mark.parametrize("letter", ["x", "é", "🐝", "\ud800"])
def test_huge_texts_are_cut_between_characters(letter: str) -> None:
    huge = letter * 50_000
    for error in (
        errors.InvalidField([(huge, huge)] * 50),
        errors.SessionNotFound(huge),
        errors.ContextFull(huge, cached=huge, prompt=huge, bound=huge),
    ):
        whole, details = _details(error)
        sent = 3 * len(whole.message.encode()) + 4 * whole.ByteSize() / 3
        assert sent < 8000
        assert whole.message.endswith("…")
        assert len(details) >= 1
