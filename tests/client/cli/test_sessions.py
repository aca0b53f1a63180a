"""`apiary sessions`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apiary_client import Client

from ..conftest import Run
from ..fake_worker import FakeWorker


@pytest.fixture
def two(client: Client) -> None:
    """Create two sessions."""
    client.create_session("alpha", labels={"team": "bees [bold]"})
    client.create_session("beta", policy="buzz(window=300,stride=3)")


@pytest.mark.usefixtures("two")
def test_list_is_a_table_for_people(apiary: Run) -> None:
    done = apiary("sessions", "list")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = (line for line in done.stdout.splitlines() if "beta" in line)
    assert all(
        part in row for part in ("empty", "buzz(window=300,stride=3)", "10 / 564", "1.0 MB", "2026-03-0")
    )


@pytest.mark.usefixtures("two")
def test_list_is_json_for_programs(apiary: Run) -> None:
    alpha, beta = json.loads(apiary("sessions", "list", "--json").stdout)
    assert (alpha["name"], beta["name"]) == ("sessions/alpha", "sessions/beta")
    assert alpha["create_time"] == "2026-03-01T12:30:00+00:00"
    assert (alpha["update_time"], alpha["state"]) == (None, "empty")
    assert alpha["cache"] == {"entries": 10, "bound": 564, "bytes": 2**20}


def test_an_empty_list_says_so(apiary: Run) -> None:
    assert apiary("sessions", "list").stdout == "no sessions\n"
    assert json.loads(apiary("sessions", "list", "--json").stdout) == []


@pytest.mark.usefixtures("two")
def test_show(apiary: Run) -> None:
    said = apiary("sessions", "show", "alpha").stdout
    assert "sessions/alpha" in said
    assert "team=bees [bold]" in said
    assert json.loads(apiary("sessions", "show", "sessions/alpha", "--json").stdout)["labels"] == {
        "team": "bees [bold]"
    }


def test_a_missing_session_is_told(apiary: Run) -> None:
    done = apiary("sessions", "show", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no session 'sessions/nobody' (`apiary sessions list` shows yours)\n"


@pytest.mark.usefixtures("two")
def test_update(apiary: Run) -> None:
    said = apiary(
        "sessions", "update", "alpha", "--label", "team=wasps", "--label", "of=1=2", "--policy", "full"
    )
    assert said.returncode == 0
    assert "of=1=2, team=wasps" in said.stdout
    assert "full" in said.stdout
    updated = json.loads(apiary("sessions", "update", "beta", "--ttl", "90", "--json").stdout)
    assert updated["name"] == "sessions/beta"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--policy, --ttl or --label"),
        (("--label", "team"), "not KEY=VALUE"),
        (("--label", "k=1", "--label", "l=1", "--label", "k=2"), "'k' is given twice"),
    ],
)
def test_an_update_that_is_not_clear(apiary: Run, flags: tuple[str, ...], said: str) -> None:
    done = apiary("sessions", "update", "alpha", *flags)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


@pytest.mark.usefixtures("two")
def test_rewind(apiary: Run, worker: FakeWorker) -> None:
    worker.sessions["sessions/alpha"].turn_count = 5
    kept = apiary("sessions", "rewind", "alpha", "--keep", "3", "--json")
    assert json.loads(kept.stdout)["turn_count"] == 3
    back = apiary("sessions", "rewind", "alpha", "--back", "1", "--json")
    assert json.loads(back.stdout)["turn_count"] == 2
    refused = apiary("sessions", "rewind", "alpha", "--back", "9")
    assert (refused.returncode, refused.stderr) == (1, "error: alpha has 2 turns: --back is at most that\n")
    refused = apiary("sessions", "rewind", "alpha", "--keep", "9")
    assert (refused.returncode, refused.stderr) == (1, "error: alpha has 2 turns: --keep is at most that\n")
    for neither in ((), ("--keep", "1", "--back", "1")):
        assert apiary("sessions", "rewind", "alpha", *neither).returncode == 2
    beyond = apiary("sessions", "rewind", "alpha", "--keep", "9" * 20)
    assert (beyond.returncode, beyond.stderr.count("\n")) == (1, 1)


@pytest.mark.usefixtures("two")
def test_fork(apiary: Run) -> None:
    assert "sessions/gamma" in apiary("sessions", "fork", "alpha", "gamma").stdout
    assert json.loads(apiary("sessions", "fork", "alpha", "--json").stdout)["name"] == "sessions/drawn"
    assert apiary("sessions", "fork", "nobody").returncode == 1


@pytest.mark.usefixtures("two")
def test_delete(apiary: Run, worker: FakeWorker) -> None:
    done = apiary("sessions", "delete", "alpha", "sessions/beta")
    assert (done.returncode, worker.sessions) == (0, {})
    assert apiary("sessions", "delete", "alpha").returncode == 1


def test_a_long_name_is_shown_whole(apiary: Run, client: Client) -> None:
    client.create_session("a" * 63)
    assert "a" * 63 in apiary("sessions", "list", COLUMNS="80").stdout.replace("\n", "")


@pytest.mark.usefixtures("two")
def test_export_and_import(apiary: Run, tmp_path: Path) -> None:
    file = tmp_path / "alpha.apiary"
    done = apiary("sessions", "export", "alpha", str(file))
    assert (done.returncode, file.read_bytes()) == (0, b"one two three")
    assert file.stat().st_mode & 0o777 == 0o600
    assert "exported alpha" in done.stderr
    again = apiary("sessions", "export", "alpha", str(file))
    assert (again.returncode, "--force" in again.stderr) == (2, True)
    assert apiary("sessions", "export", "alpha", str(file), "--force").returncode == 0
    taken = apiary("sessions", "import", str(file), "--as", "there", "--json")
    assert json.loads(taken.stdout)["name"] == "sessions/there"
    file.write_bytes(b"four")
    refused = apiary("sessions", "import", str(file))
    assert refused.stderr == "error: it was SNAPSHOT_REFUSED (try again in 1.5 s)\n"


@pytest.mark.usefixtures("two")
def test_exports_that_fail_leave_nothing(apiary: Run, tmp_path: Path) -> None:
    assert apiary("sessions", "export", "nobody", str(tmp_path / "x")).returncode == 1
    assert list(tmp_path.iterdir()) == []
    missing = apiary("sessions", "export", "alpha", str(tmp_path / "no" / "x"))
    assert (missing.returncode, "cannot be written: No such file" in " ".join(missing.stderr.split())) == (
        1,
        True,
    )
    absent = apiary("sessions", "import", str(tmp_path / "absent"))
    assert (absent.returncode, "cannot be read: No such file" in " ".join(absent.stderr.split())) == (1, True)
