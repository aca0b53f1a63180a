"""`apiary sessions map`: the picture, the lists, and what a hostile text can do to a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from apiary_client import Client

from ..conftest import Run
from ..fake_worker import FakeWorker, status


@pytest.fixture
def work(client: Client, worker: FakeWorker) -> None:
    """A session with a turn."""
    client.create_session("work", policy="buzz2")
    worker.sessions["sessions/work"].turn_count = 1


@pytest.mark.usefixtures("work")
def test_a_summary_is_a_picture_and_a_table(process: Run, worker: FakeWorker) -> None:
    done = process("sessions", "map", "work", COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    (asked,) = worker.requests[1:]
    assert (asked.view, asked.column_count, asked.token_limit, list(asked.layers)) == (1, 52, 20, [])
    lines = done.stdout.splitlines()
    assert lines[:8] == [
        "sessions/work, resident: buzz2",
        "4 of 10 tokens in each of 6 heads, 8 in some",
        "   0        9",
        "0  ██   ▒▒  █",
        "1  █ █  ▒▒  █",
        "2  █  █ ▒▒  █",
        "   sccc cc  w",
        "   s sink 1  c cell 2  w window 1  (entries of each head)",
    ]
    rows = [line.strip().split(maxsplit=4) for line in lines[lines.index("") + 2 :]]
    assert rows[0] == ["0", "6", "0.00", "sink", '"<|im_start|>"']
    assert [row[1] for row in rows] == ["6", "2", "2", "2", "3", "3", "6"]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_texts_of_tokens_do_nothing_to_a_terminal(apiary: Run, flags: tuple[str, ...]) -> None:
    said = apiary("sessions", "map", "work", *flags).stdout
    assert all(sign.isprintable() or sign == "\n" for sign in said)
    for text in (r'"\u202e\x9b"', r'" the\x1b[31m"', r'"\n"', '" [bold]"', '"\ufffd"'):
        assert text in said


@pytest.mark.usefixtures("work")
def test_a_full_map_lists_every_head(apiary: Run, worker: FakeWorker) -> None:
    done = apiary("sessions", "map", "sessions/work", "--full", "--layer", "2", "--layer", "0")
    assert done.returncode == 0
    asked = worker.requests[-1]
    assert (asked.view, asked.token_limit, list(asked.layers)) == (2, 0, [2, 0])
    lines = done.stdout.splitlines()
    assert [line[:3] for line in lines[3:7]] == ["2.0", "2.1", "0.0", "0.1"]
    start = lines.index("position  kind           2.0       2.1  text")
    assert lines[start + 1 : start + 6] == [
        '       0  sink          0.00      0.00  "<|im_start|>"',
        r'       3  cell          1.50      1.50  "\n"',
        '       5  cell          2.50         -  " [bold]"',
        '       6  cell             -      3.00  "\ufffd"',
        '       9  window        4.50      4.50  """',
    ]
    assert lines.count("position  kind           0.0       0.1  text") == 1


@pytest.mark.usefixtures("work")
def test_json_has_all(apiary: Run) -> None:
    said = apiary("sessions", "map", "work", "--full", "--json").stdout
    assert {sign for sign in said if not sign.isprintable()} <= {"\n", "\u202e"}
    drawn = json.loads(said)
    assert drawn["layers"][1]["heads"][0]["positions"] == [0, 2, 5, 9]
    assert drawn["layers"][1]["heads"][0]["kinds"] == ["sink", "cell", "cell", "window"]
    assert [token["text"] for token in drawn["tokens"][1:3]] == ["\u202e\x9b", " the\x1b[31m"]
    assert drawn["state"] == "resident"


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("flags", [(), ("--full", "--layer", "1"), ("--json",)])
def test_a_picture_in_a_file(apiary: Run, worker: FakeWorker, tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / "map.png"
    done = apiary("sessions", "map", "work", "--png", str(path), *flags)
    assert done.returncode == 0
    assert done.stderr.replace("\n", "").endswith(f"wrote {path}")  # behind what matplotlib says of fonts
    assert worker.requests[-1].column_count == 512
    assert path.read_bytes().startswith(b"\x89PNG")
    picture = imread(path)
    assert picture.shape[1] == 1200
    colours = {tuple(pixel) for pixel in (picture[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert {(0xD6, 0x27, 0x28), (0xE0, 0x82, 0x14), (0x1F, 0x5F, 0xB4)} <= colours, "sink, cell and window"


@pytest.mark.usefixtures("work")
def test_a_picture_that_cannot_be_written(apiary: Run, tmp_path: Path) -> None:
    done = apiary("sessions", "map", "work", "--png", str(tmp_path / "no" / "map.png"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No such file" in done.stderr


@pytest.mark.usefixtures("work")
def test_a_picture_needs_matplotlib(apiary: Run, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = len(worker.requests)
    done = apiary("sessions", "map", "work", "--png", "map.png")
    assert (done.returncode, done.stderr) == (1, "error: --png needs matplotlib: pip install matplotlib\n")
    assert len(worker.requests) == before
    assert apiary("sessions", "map", "work").returncode == 0


def test_a_session_without_a_cache(apiary: Run, client: Client, tmp_path: Path) -> None:
    client.create_session("new", policy="full")
    for flags in ((), ("--full",)):
        done = apiary("sessions", "map", "new", *flags)
        assert (done.returncode, done.stdout) == (0, "sessions/new, empty: full\nit has no cache now\n")
    assert json.loads(apiary("sessions", "map", "new", "--json").stdout)["entries"] == 0
    done = apiary("sessions", "map", "new", "--png", str(tmp_path / "map.png"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("work")
def test_what_is_refused(apiary: Run, worker: FakeWorker) -> None:
    assert apiary("sessions", "map", "work", "--full", "--tokens", "9").returncode == 2
    assert apiary("sessions", "map", "work", "--layer", "-1").returncode == 2
    beyond = apiary("sessions", "map", "work", "--layer", "9" * 20)
    assert (beyond.returncode, beyond.stderr.count("\n")) == (1, 1)
    worker.fail_next = [status("SESSION_BUSY")]
    busy = apiary("sessions", "map", "work")
    assert (busy.returncode, busy.stdout) == (1, "")
    assert "wait until its other turn ends" in busy.stderr
    assert "no session" in apiary("sessions", "map", "nobody").stderr


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("width", [20, 33, 80, 120])
def test_it_fits_the_terminal(process: Run, width: int) -> None:
    said = process("sessions", "map", "work", COLUMNS=str(width)).stdout.splitlines()
    picture = said[2 : said.index("")]
    assert len(picture) >= 7
    assert all(len(line) <= width for line in picture)
