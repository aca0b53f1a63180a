"""Clients that know nothing of ours but the protobuf files, or not even these; and our own examples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apiary_client import Client
from apiary_client.errors import SessionNotFound

from .worker import Worker, environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BUF = Path(sys.executable).with_name("buf")


def _buf_curl(worker: Worker, method: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Call a method as reflection describes it."""
    address = f"http://{worker.target}/apiary.v1.{method}"
    return subprocess.run(
        [
            BUF,
            "curl",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            "--data",
            json.dumps(request),
            address,
        ],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def _responses(said: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert said.returncode == 0, said.stderr
    decoder, rest, responses = json.JSONDecoder(), said.stdout.lstrip(), []
    while rest:
        response, end = decoder.raw_decode(rest)
        responses.append(response)
        rest = rest[end:].lstrip()
    return responses


def test_buf_curl_over_reflection(worker: Worker, client: Client) -> None:
    (session,) = _responses(_buf_curl(worker, "SessionService/CreateSession", {"session_id": "by-buf"}))
    name = session["name"]
    assert name == "sessions/by-buf"
    for content in ("My favourite colour is teal.", "What is my favourite colour?"):
        turn = {
            "session": name,
            "messages": {"messages": [{"role": "ROLE_USER", "content": content}]},
            "stopping": {"max_tokens": 40, "ignore_eos": True},
        }
        responses = _responses(_buf_curl(worker, "GenerationService/StreamGenerate", turn))
        assert len(responses) > 1
        assert all("usage" not in response for response in responses[:-1])
        assert responses[-1]["finishReason"] == "FINISH_REASON_LENGTH"
        assert responses[-1]["usage"]["completionTokens"] == 40
        assert sum(len(response.get("tokenIds", [])) for response in responses) == 40
    (session,) = _responses(_buf_curl(worker, "SessionService/GetSession", {"name": name}))
    assert session["turnCount"] == 2
    assert session["state"] == "STATE_RESIDENT"
    assert _responses(_buf_curl(worker, "SessionService/DeleteSession", {"name": name})) == [{}]
    with pytest.raises(SessionNotFound):
        client.get_session(name)


def test_buf_curl_shows_an_error(worker: Worker) -> None:
    said = _buf_curl(worker, "SessionService/GetSession", {"name": "sessions/nobody"})
    assert said.returncode != 0
    error = json.loads(said.stderr)
    assert error["code"] == "not_found"
    assert "sessions/nobody" in error["message"]
    assert [detail["type"] for detail in error["details"]] == [
        "google.rpc.ErrorInfo",
        "google.rpc.ResourceInfo",
    ]


@pytest.mark.parametrize("name", ["chat_sync.py", "chat_asyncio.py"])
def test_python_example(worker: Worker, client: Client, name: str) -> None:
    said = subprocess.run(
        [sys.executable, EXAMPLES / name, worker.target],
        env=environment(PYTHONIOENCODING="utf-8"),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    if name == "chat_sync.py":
        assert said.stdout.count(" tokens]") == 2
        assert "> What is my favourite colour?" in said.stdout
    else:
        assert "teal:\n" in said.stdout
        assert "crimson:\n" in said.stdout
    assert list(client.list_sessions()) == []


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_node_example(worker: Worker, client: Client, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("node_modules")
    copy = shutil.copytree(EXAMPLES / "node", tmp_path / "node", ignore=ignored)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline"]
    try:
        installed = subprocess.run(install, cwd=copy, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install takes more than a minute")
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr[-200:]}")
    said = subprocess.run(
        ["node", "chat.mjs", worker.target],
        cwd=copy,
        env=os.environ | {"PROTO_PATH": str(ROOT / "proto")},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count(" tokens]") == 2
    assert list(client.list_sessions()) == []
