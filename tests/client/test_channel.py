"""What travels beside a call: metadata, retries, limits, encryption."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from apiary.v1 import generation_pb2, model_pb2, session_pb2
from apiary_client import TLS, ApiaryError, Client, channel
from apiary_client.errors import Draining, Unavailable

from .fake_worker import FakeWorker, status

IDEMPOTENT: dict[str, Callable[[Client], object]] = {
    "GetModel": lambda client: client.get_model(),
    "GetCapacity": lambda client: client.get_capacity(),
    "GetSession": lambda client: client.get_session("work"),
    "ListSessions": lambda client: list(client.list_sessions()),
    "GetCacheMap": lambda client: client.get_cache_map("work"),
    "Tokenize": lambda client: client.tokenize("hi"),
    "Detokenize": lambda client: client.detokenize([104]),
}
ONCE: dict[str, Callable[[Client], object]] = {
    "Generate": lambda client: client.generate("hi"),
    "StreamGenerate": lambda client: list(client.stream("hi")),
    "CreateSession": lambda client: client.create_session("other"),
    "DeleteSession": lambda client: client.delete_session("work"),
}


@pytest.mark.parametrize("method", IDEMPOTENT)
def test_reads_are_repeated_while_the_worker_is_unavailable(
    client: Client, worker: FakeWorker, method: str
) -> None:
    client.create_session("work")
    before = len(worker.requests)
    worker.fail_next = [status("DRAINING"), status("DRAINING")]
    assert IDEMPOTENT[method](client)
    assert len(worker.requests) - before == 3


@pytest.mark.parametrize("method", ONCE)
def test_turns_and_changes_are_never_repeated(client: Client, worker: FakeWorker, method: str) -> None:
    client.create_session("work")
    before = len(worker.requests)
    worker.fail_next = [status("DRAINING")]
    with pytest.raises(Draining):
        ONCE[method](client)
    assert len(worker.requests) - before == 1


def test_other_failures_are_not_repeated(client: Client, worker: FakeWorker) -> None:
    worker.fail_next = [status("QUEUE_FULL")]
    with pytest.raises(ApiaryError):
        client.get_model()
    assert len(worker.requests) == 1


def test_the_lists_name_every_method_that_the_client_calls() -> None:
    offered = {
        f"{service.full_name}/{method.name}"
        for file in (generation_pb2, session_pb2, model_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    retried = {
        f"{name['service']}/{name['method']}" for name in channel.SERVICE_CONFIG["methodConfig"][0]["name"]
    }
    assert retried <= offered
    assert {name.rpartition("/")[2] for name in retried} == set(IDEMPOTENT)


def test_calls_say_whose_they_are_and_which_session(client: Client, worker: FakeWorker) -> None:
    session = client.create_session("work")
    client.generate("hi", session=session)
    list(client.stream("hi", session=session))
    client.get_session(session)
    client.delete_session(session)
    assert [metadata.get("x-apiary-session") for metadata in worker.metadata] == ["sessions/work"] * 5
    client.generate("hi")
    client.create_session()
    list(client.list_sessions())
    assert all("x-apiary-session" not in metadata for metadata in worker.metadata[5:])
    assert {metadata["x-apiary-tenant"] for metadata in worker.metadata} == {"bees"}


def test_no_tenant_is_no_metadata(worker: FakeWorker) -> None:
    with Client(worker.target) as client:
        client.get_model()
    assert "x-apiary-tenant" not in worker.metadata[0]


@pytest.mark.parametrize("tenant", ["", "naïve", "a\nb"])
def test_a_tenant_that_no_header_can_carry_is_refused(tenant: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Client(tenant=tenant)


def test_a_name_that_no_header_can_carry_still_reaches_the_worker(client: Client, worker: FakeWorker) -> None:
    with pytest.raises(ApiaryError, match="sessions/härte"):
        client.get_session("härte")
    assert "x-apiary-session" not in worker.metadata[0]


def test_messages_have_a_limit(worker: FakeWorker) -> None:
    with Client(worker.target, max_message_bytes=1000) as client:
        assert client.tokenize("a" * 100)
        with pytest.raises(ApiaryError, match="larger than max") as caught:
            client.tokenize("a" * 2000)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_checks_the_worker(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=apiary", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-nodes", "-keyout", key, "-out", certificate, *subject],
        check=True,
        capture_output=True,
        timeout=30,
    )
    pair = (key.read_bytes(), certificate.read_bytes())
    worker = FakeWorker(grpc.ssl_server_credentials([pair]))
    try:
        with Client(worker.target, tls=TLS(certificate)) as client:
            assert client.get_model().name == "models/fake"
        with Client(worker.target, tls=TLS()) as client, pytest.raises(Unavailable):
            client.generate("hi", timeout=10)  # the system's roots do not know this worker
    finally:
        worker.stop()


def test_tls_without_its_file_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Client(tls=TLS(tmp_path / "nothing.pem"))
