"""The gRPC server: its options, services, health and address."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from apiary.v1 import generation_pb2, model_pb2, session_pb2
from apiary.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from apiary.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from apiary.v1.session_pb2_grpc import add_SessionServiceServicer_to_server
from apiary_server.rpc.generation import GenerationService
from apiary_server.rpc.interceptors import CallInterceptor
from apiary_server.rpc.models import ModelService
from apiary_server.rpc.sessions import SessionService
from apiary_server.settings import Settings

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine

SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (generation_pb2.DESCRIPTOR, "GenerationService"),
        (session_pb2.DESCRIPTOR, "SessionService"),
        (model_pb2.DESCRIPTOR, "ModelService"),
    )
)
_SPARE_STREAMS = 1024


class App:
    """One gRPC server before one engine. Make it in the event loop that it shall run in.

    Raises:
        OSError: the address cannot be taken, or a TLS file not be read.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._server = aio.server(interceptors=[CallInterceptor()], options=_options(settings))
        self._health = health.aio.HealthServicer()
        add_GenerationServiceServicer_to_server(GenerationService(engine, settings), self._server)
        add_SessionServiceServicer_to_server(SessionService(engine, settings), self._server)
        add_ModelServiceServicer_to_server(ModelService(engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self.address = self._bind(settings)

    async def start(self) -> None:
        """Serve, and say so in the health service."""
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def refuse_health(self) -> None:
        """From now on the health service says NOT_SERVING; calls are still answered."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cancel them."""
        await self._server.stop(grace)

    def _bind(self, settings: Settings) -> str:
        check_address(settings.listen)
        if settings.tls_cert_file is None or settings.tls_key_file is None:
            port = self._server.add_insecure_port(settings.listen)
        else:
            # gRPC takes any bytes for a certificate and fails at the first handshake
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                settings.tls_cert_file, settings.tls_key_file
            )
            pair = settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes()
            port = self._server.add_secure_port(settings.listen, grpc.ssl_server_credentials([pair]))
        return f"{settings.listen.rpartition(':')[0]}:{port}"


def check_address(listen: str) -> None:
    """See whether the address can be taken; gRPC's own error does not say why not.

    Raises:
        OSError: it cannot, with the address and the reason.
    """
    host, _, port = listen.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise OSError(f"cannot listen on {listen}: {error.strerror or error}") from error


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        # two workers on one port would each get some of the calls, and none the other's sessions
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # answers are bounded by max_tokens already
        ("grpc.max_send_message_length", -1),
        # A full queue must be told by RESOURCE_EXHAUSTED with RetryInfo, not by a stream that HTTP/2 holds
        # back: one connection (a router's) may carry all turns and more.
        ("grpc.max_concurrent_streams", settings.max_running + settings.queue_limit + _SPARE_STREAMS),
        # a client that vanished without a word is noticed within 40 seconds, and its turns roll back
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # clients may ping as often as every 10 seconds, idle ones too
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
