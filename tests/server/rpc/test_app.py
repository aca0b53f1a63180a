"""Health, reflection, addresses, TLS and options."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from apiary.v1 import generation_pb2, model_pb2
from apiary.v1.generation_pb2_grpc import GenerationServiceStub
from apiary.v1.model_pb2_grpc import ModelServiceStub
from apiary_server.rpc.app import SERVICES, App, check_address
from apiary_server.settings import Settings

from .answers import ask
from .fake_engine import FakeEngine

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_health(app: App, channel: grpc.aio.Channel, service: str) -> None:
    health = HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    watch = health.Watch(request)
    assert (await health.Check(request)).status == SERVING
    assert (await watch.read()).status == SERVING
    await app.refuse_health()
    assert (await watch.read()).status == NOT_SERVING
    assert (await health.Check(request)).status == NOT_SERVING
    watch.cancel()


async def test_health_of_an_unknown_service(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
async def test_noise_for_health(channel: grpc.aio.Channel, method: str) -> None:
    answer = await ask(channel, f"/{method}", b"\xff" * 9)
    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_reflection(channel: grpc.aio.Channel) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="apiary.v1.GenerationService"),
    ]
    listed, found = [
        one async for one in ServerReflectionStub(channel).ServerReflectionInfo(iter(requests), timeout=10)
    ]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert found.file_descriptor_response.file_descriptor_proto


async def test_noise_for_reflection(channel: grpc.aio.Channel) -> None:
    answer = await ask(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\xff" * 9)
    assert answer.reason == "MALFORMED_MESSAGE"


async def test_the_bound_port_is_reported(app: App) -> None:
    host, _, port = app.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


async def test_an_address_in_use(app: App, engine: FakeEngine) -> None:
    taken = Settings(listen=app.address)
    with pytest.raises(OSError, match=f"cannot listen on {app.address}: Address already in use"):
        App(engine, taken)


@pytest.mark.parametrize("listen", ["no-such-host.invalid:1", "192.0.2.1:0"])
def test_an_address_that_is_not_ours(listen: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {listen}: "):
        check_address(listen)


@pytest.mark.parametrize("listen", ["localhost:0", "127.0.0.1:0"])
def test_a_free_address(listen: str) -> None:
    check_address(listen)


async def test_ipv6(engine: FakeEngine) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    app = App(engine, Settings(listen="[::1]:0"))
    await app.start()
    async with grpc.aio.insecure_channel(app.address) as channel:
        assert (await ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())).name == "models/fake"
    await app.stop(0)


async def test_an_oversized_message(engine: FakeEngine) -> None:
    app = App(engine, Settings(listen="127.0.0.1:0", max_message_bytes=1000))
    await app.start()
    async with grpc.aio.insecure_channel(app.address) as channel:
        stub = GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(generation_pb2.TokenizeRequest(text="x" * 1001))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await stub.Tokenize(generation_pb2.TokenizeRequest(text="x" * 900))).token_ids) == 900
    await app.stop(0)


async def test_stopping_lets_calls_finish(app: App, channel: grpc.aio.Channel, engine: FakeEngine) -> None:
    engine.pace = 0.1
    stub = GenerationServiceStub(channel)
    responses = aiter(stub.StreamGenerate(generation_pb2.GenerateRequest(text="hi")))
    await anext(responses)
    stopping = asyncio.create_task(app.stop(10))
    assert [response.text async for response in responses] == ["t1 ", "t2 ", "t3 "]
    await stopping


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    place = tmp_path_factory.mktemp("tls")
    certificate, key = place / "cert.pem", place / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


async def test_tls(engine: FakeEngine, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    app = App(engine, Settings(listen="localhost:0", tls_cert_file=cert, tls_key_file=key))
    await app.start()
    trusted = grpc.ssl_channel_credentials(cert.read_bytes())
    async with grpc.aio.secure_channel(app.address, trusted) as channel:
        assert (await ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest())).name == "models/fake"
    async with grpc.aio.insecure_channel(app.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await app.stop(0)


async def test_tls_files_that_are_none(engine: FakeEngine, tmp_path: Path) -> None:
    noise = tmp_path / "noise.pem"
    with pytest.raises(ValueError, match="tls_cert_file"):
        App(engine, Settings(listen="localhost:0", tls_cert_file=noise, tls_key_file=noise))
    noise.write_text(f"noise of {datetime.date.today()}")
    with pytest.raises(OSError, match="PEM"):
        App(engine, Settings(listen="localhost:0", tls_cert_file=noise, tls_key_file=noise))
