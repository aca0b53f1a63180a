"""Every reason of the service comes back as its own exception, whole."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status

from apiary.v1.error_reason_pb2 import ErrorReason
from apiary_client import Client, aio, errors

from .fake_worker import CODES, FakeWorker, status

REASONS = [name.removeprefix("ERROR_REASON_") for name, number in ErrorReason.items() if number]


def test_every_reason_has_its_own_class() -> None:
    assert set(errors.BY_REASON) == set(REASONS) == set(CODES)
    kinds = list(errors.BY_REASON.values())
    assert len(set(kinds)) == len(kinds)
    assert all(issubclass(kind, errors.ApiaryError) and kind.__doc__ for kind in kinds)


def check(error: errors.ApiaryError, reason: str) -> None:
    assert type(error) is errors.BY_REASON[reason]
    assert error.reason == reason
    assert error.code is CODES[reason]
    assert str(error) == error.message == f"it was {reason}"
    assert error.metadata == {"incident": "abc123"}
    assert error.retry_after == 1.5
    assert error.resource == "sessions/x"
    assert error.violations == (errors.Violation("sampling.temperature", "must be at most 10"),)


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_come_back(client: Client, reason: str) -> None:
    with pytest.raises(errors.ApiaryError) as caught:
        client.generate(f"fail {reason}")
    check(caught.value, reason)
    deltas = client.stream(f"fail {reason}")
    assert next(deltas).text == "turn"
    with pytest.raises(errors.ApiaryError) as caught:
        next(deltas)
    check(caught.value, reason)


@pytest.mark.parametrize("reason", REASONS)
async def test_reasons_come_back_with_asyncio(aclient: aio.Client, reason: str) -> None:
    with pytest.raises(errors.ApiaryError) as caught:
        await aclient.generate(f"fail {reason}")
    check(caught.value, reason)
    deltas = aclient.stream(f"fail {reason}")
    assert (await anext(deltas)).text == "turn"
    with pytest.raises(errors.ApiaryError) as caught:
        await anext(deltas)
    check(caught.value, reason)


def test_an_incident_has_its_name(client: Client) -> None:
    with pytest.raises(errors.Internal) as caught:
        client.generate("fail INTERNAL")
    assert caught.value.incident == "abc123"


def test_a_reason_newer_than_this_client_keeps_its_name(client: Client, worker: FakeWorker) -> None:
    worker.fail_next = [status("HIVE_ON_FIRE")]
    with pytest.raises(errors.ApiaryError) as caught:
        client.generate("hello")
    assert type(caught.value) is errors.ApiaryError
    assert (caught.value.reason, caught.value.code) == ("HIVE_ON_FIRE", grpc.StatusCode.ABORTED)


def test_reasons_of_other_domains_are_not_ours(client: Client, worker: FakeWorker) -> None:
    worker.fail_next = [status("INTERNAL", domain="proxy.example")]
    with pytest.raises(errors.Internal) as caught:
        client.generate("hello")
    assert (caught.value.reason, caught.value.metadata, caught.value.incident) == (None, {}, None)


def test_details_that_contradict_the_status_are_left_out(client: Client, worker: FakeWorker) -> None:
    whole = status("SESSION_BUSY")
    contradicting = rpc_status.to_status(status_pb2.Status(code=14, message="proxied"))._replace(
        trailing_metadata=whole.trailing_metadata
    )
    worker.fail_next = [contradicting]
    with pytest.raises(errors.Unavailable) as caught:
        client.generate("hello")
    assert caught.value.reason is None


def test_a_method_that_nobody_offers(worker: FakeWorker) -> None:
    with grpc.insecure_channel(worker.target) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/apiary.v1.GenerationService/Sing")(b"")
    assert isinstance(errors.restore(caught.value), errors.MethodNotImplemented)
