"""The Dockerfile: linted, and its parts tried. Nothing here builds it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from dockerfile_parse import DockerfileParser
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from apiary_server.settings import Settings

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


@pytest.fixture(scope="module")
def dockerfile() -> list[dict[str, str]]:
    return DockerfileParser(str(ROOT / "Dockerfile")).structure


def values(dockerfile: list[dict[str, str]], instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile if step["instruction"] == instruction]


def test_the_dockerfile_lints() -> None:
    done = subprocess.run(
        [HADOLINT, "--failure-threshold", "info", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_copies_what_exists_and_is_not_ignored(dockerfile: list[dict[str, str]]) -> None:
    sources: set[str] = set()
    for copy in values(dockerfile, "COPY"):
        words = shlex.split(copy)
        if not words[0].startswith("--from="):
            sources |= set(words[:-1])
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    packaged = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {path.split("/")[0] for path in packaged} <= sources


def test_torch_is_installed_as_the_project_asks(dockerfile: list[dict[str, str]]) -> None:
    (step,) = (run for run in values(dockerfile, "RUN") if "torch.txt" in run)
    code = re.search(r"-c '([^']+)'", step)
    assert code is not None
    printed = subprocess.check_output([sys.executable, "-c", code[1]], cwd=ROOT, text=True, timeout=30)
    (torch,) = (
        need for need in PYPROJECT["project"]["optional-dependencies"]["server"] if need.startswith("torch")
    )
    assert printed == f"{torch}\n"


def test_the_image_does_not_run_as_root(dockerfile: list[dict[str, str]]) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", values(dockerfile, "USER")[-1])


def test_the_image_starts_a_worker(dockerfile: list[dict[str, str]]) -> None:
    assert json.loads(values(dockerfile, "ENTRYPOINT")[-1]) == ["apiary"]
    command = json.loads(values(dockerfile, "CMD")[-1])
    assert command == ["serve", "--listen", "0.0.0.0:50051", "--insecure"]
    settings = Settings.load(listen=command[2], insecure=True)
    assert settings.listen.rpartition(":")[2] == values(dockerfile, "EXPOSE")[-1]


@pytest.mark.parametrize("serving", [True, False])
def test_the_health_check_tells_a_serving_worker(dockerfile: list[dict[str, str]], serving: bool) -> None:
    check = values(dockerfile, "HEALTHCHECK")[-1]
    python, flag, code = json.loads(check[check.index("CMD") + 3 :])
    assert (python, flag) == ("python", "-c")

    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    status = health_pb2.HealthCheckResponse
    servicer.set("", status.SERVING if serving else status.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code = code.replace(":50051", f":{port}")
        assert str(port) in code
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
        assert (done.returncode == 0) is serving
    finally:
        server.stop(None).wait()
