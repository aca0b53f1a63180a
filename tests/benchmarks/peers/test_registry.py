"""Engines by name. None is installed, and none runs."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from apiary_bench.errors import SettingsError
from apiary_bench.peers import registry
from apiary_bench.peers.apiary import Own
from apiary_bench.peers.engine import EngineError, Identity
from apiary_bench.peers.environment import Environment
from apiary_bench.peers.guest import RUNNER
from apiary_bench.peers.registry import Foreign
from apiary_bench.peers.workload import GIB, Load
from apiary_bench.progress import Observer
from apiary_server.model import catalog

from .fakes import workload

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 100,
    "vocab_size": 300,
}
LOADS = (
    Load(sessions=5, history=10, input=2, output=3),
    Load(sessions=2, history=80, input=2, output=3),
    Load(sessions=9, history=200, input=2, output=3),  # beyond the model's positions
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a configuration alone."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The environments that were asked for; none is made."""
    names: list[str] = []
    monkeypatch.setattr(Environment, "make", lambda self, observe: names.append(self.path.name))
    return names


class Guests:
    """Takes the place of what starts a runner, and remembers how."""

    def __init__(self) -> None:
        self.command: Sequence[str | Path] = ()
        self.settings: Mapping[str, Any] = {}
        self.variables: Mapping[str, str] = {}

    @asynccontextmanager
    async def __call__(
        self,
        name: str,
        command: Sequence[str | Path],
        settings: Mapping[str, Any],
        log: Path,
        variables: Mapping[str, str],
        patience: float,
    ) -> AsyncIterator[SimpleNamespace]:
        self.command, self.settings, self.variables = command, settings, variables
        yield SimpleNamespace(name=name)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    """No runner runs."""
    fake = Guests()
    monkeypatch.setattr(registry, "guest", fake)
    return fake


def nobody(stage: str, done: int, total: int) -> None:
    """Hears nothing."""


def peers(*names: str, model: Path, root: Path, observe: Observer = nobody) -> list[Any]:
    """Those engines."""
    return list(
        registry.peers(names, model=str(model), policy=None, root=root, torch_index=None, observe=observe)
    )


def test_engines_come_in_the_order_asked_for_and_once(model: Path, made: list[str], tmp_path: Path) -> None:
    found = peers("vllm", "apiary-int8", "transformers", "vllm", model=model, root=tmp_path / "root")
    assert [peer.name for peer in found] == ["vllm", "apiary-int8", "transformers"]
    assert [type(peer) for peer in found] == [Foreign, Own, Foreign]
    assert made == ["vllm", "transformers"]


def test_engines_that_differ_in_settings_share_an_environment(
    model: Path, made: list[str], tmp_path: Path
) -> None:
    peers("vllm", "vllm-fp8", model=model, root=tmp_path)
    assert made == ["vllm", "vllm"]


def test_an_unknown_engine_is_refused_with_those_that_there_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="no engine gpt5: choose among apiary-fp32, apiary-int8, apiary-fp32-bf16"
    ):
        peers("vllm", "gpt5", model=model, root=tmp_path)


def test_every_default_is_known_and_pinned() -> None:
    assert set(registry.DEFAULT) <= set(registry.names())
    for spec in registry._SPECS.values():
        assert re.fullmatch(r"\d+(\.\d+)+", spec.recipe.version)
        assert spec.recipe.torch is None or re.fullmatch(r"\d+(\.\d+)+", spec.recipe.torch)
    assert "torchvision" in registry._SPECS["vllm"].recipe.without


@pytest.mark.usefixtures("made")
async def test_an_engine_is_sized_for_what_it_can_take(model: Path, guests: Guests, tmp_path: Path) -> None:
    (vllm,) = peers("vllm-fp8", model=model, root=tmp_path)
    async with vllm.start(workload(*LOADS)):
        pass
    assert guests.command == [str(tmp_path / "vllm" / "bin" / "python"), "-E", "-P", RUNNER, "vllm"]
    cpus = guests.settings["cpus"]
    assert cpus == sorted(set(cpus))
    assert cpus
    assert guests.settings == {
        "model": str(model),
        "sessions": 5,
        "positions": 86,
        "model_positions": 100,
        "entry_values": 2 * 3 * 2 * 16,
        "budget_bytes": GIB,
        "cpus": cpus,
        "cache": "fp8",
    }


@pytest.mark.usefixtures("made")
async def test_vllm_is_given_the_libraries_that_its_manual_asks_for(
    model: Path, guests: Guests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vllm,) = peers("vllm", model=model, root=tmp_path)
    monkeypatch.setattr(registry, "find_library", lambda name: None)
    async with vllm.start(workload(LOADS[0])):
        assert guests.variables == {}
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(registry, "find_library", lambda name: f"lib{name}.so.4")
    async with vllm.start(workload(LOADS[0])):
        assert guests.variables == {"LD_PRELOAD": f"{library}:libtcmalloc_minimal.so.4"}


@pytest.mark.usefixtures("made")
async def test_vllms_server_is_told_what_the_engine_within_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    @asynccontextmanager
    async def serving(
        name: str, command: Sequence[str], called: str, identity: Identity, *rest: Any
    ) -> AsyncIterator[SimpleNamespace]:
        asked.update(command=command, identity=identity, variables=rest[1])
        yield SimpleNamespace(name=name)

    monkeypatch.setattr(registry, "serving", serving)
    monkeypatch.setattr(registry, "find_library", lambda name: None)
    (server,) = peers("vllm-server", model=model, root=tmp_path)
    async with server.start(workload(*LOADS)) as running:
        assert running.name == "vllm-server"
    command = asked["command"]
    assert command[: command.index("--model") + 2] == [
        *(str(tmp_path / "vllm" / "bin" / "python"), "-E", "-P"),
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
    ]
    told = dict(pairwise(command))
    assert told["--kv-cache-memory-bytes"] == str(GIB)
    assert told["--max-num-seqs"] == "5"
    assert told["--max-model-len"] == "100"
    assert told["--dtype"] == "float32"
    assert "--enable-prefix-caching" in command
    assert asked["identity"].budget_bytes == GIB
    assert asked["identity"].positions == 100
    assert asked["variables"]["VLLM_CPU_OMP_THREADS_BIND"]


async def test_an_engine_that_was_not_installed_says_why(
    model: Path, guests: Guests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Environment, observe: Observer) -> None:
        raise EngineError("vllm cannot be installed: no wheel")

    monkeypatch.setattr(Environment, "make", fail)
    (vllm,) = peers("vllm", model=model, root=tmp_path)
    with pytest.raises(EngineError, match="no wheel"):
        async with vllm.start(workload(LOADS[0])):
            pytest.fail("it started")
    assert guests.command == ()


@pytest.mark.usefixtures("made")
async def test_llama_takes_the_published_file_and_states_its_precision(
    model: Path, guests: Guests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, int]] = []

    def published(name: str, directory: Path, progress: Any) -> Path:
        progress("download", 1, 2)
        return quantised(directory / "model.gguf")

    monkeypatch.setattr(catalog, "published", published)
    (llama,) = peers("llama.cpp", model=model, root=tmp_path, observe=lambda *told: heard.append(told))
    async with llama.start(workload(LOADS[0])):
        assert guests.settings["model"] == str(tmp_path / "model.gguf")
        assert guests.settings["weights"] == "Q8_0 75%, F32 25%"
        assert guests.settings["package"] == "xllamacpp"
    assert heard == [("download the GGUF file", 1, 2)]


@pytest.mark.usefixtures("made")
async def test_a_model_that_was_not_published_so_is_not_for_llama(
    model: Path, guests: Guests, tmp_path: Path
) -> None:
    (llama,) = peers("llama.cpp", model=model, root=tmp_path)
    with pytest.raises(EngineError, match=r"takes a GGUF file, and .*model has none"):
        async with llama.start(workload(LOADS[0])):
            pytest.fail("it started")
    assert guests.command == ()


def test_the_vocabulary_is_the_models(model: Path) -> None:
    assert registry.vocab_size(str(model)) == 300


def test_a_recipe_that_builds_says_how() -> None:
    native = registry._SPECS["llama.cpp-native"].recipe
    assert "-DGGML_NATIVE=ON" in native.build["CMAKE_ARGS"]


def quantised(path: Path) -> Path:
    """A GGUF file: three quarters of its numbers in 8 bits, the rest in float32."""
    writer = GGUFWriter(path, "llama")
    packed = np.zeros((3, 34), dtype=np.uint8)  # blocks of 32 numbers
    writer.add_tensor("a", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
