"""URLs of stores: what they say, and that no message repeats one."""

from __future__ import annotations

import pytest

from apiary_server.sessions.valkey.address import ValkeyAddress


def test_defaults() -> None:
    address = ValkeyAddress.parse("valkey://bees")
    assert address.options == {"host": "bees", "port": 6379, "db": 0, "socket_keepalive": True}
    assert (address.namespace, address.lease) == ("apiary", 10.0)
    assert address.shown == "valkey://bees:6379/0?namespace=apiary"


def test_everything_that_can_be_said() -> None:
    address = ValkeyAddress.parse(
        "valkeys://me%40home:p%2Fw%3A%C3%A9@[::1]:6380/7?namespace=hive-1.b_c&lease=2.5&ca=/etc/ca%201.pem"
    )
    assert address.options == {
        "host": "::1",
        "port": 6380,
        "db": 7,
        "socket_keepalive": True,
        "ssl": True,
        "ssl_check_hostname": True,
        "ssl_ca_certs": "/etc/ca 1.pem",
        "username": "me@home",
        "password": "p/w:é",
    }
    assert (address.namespace, address.lease) == ("hive-1.b_c", 2.5)
    assert address.shown == "valkeys://[::1]:6380/7?namespace=hive-1.b_c"


def test_sockets() -> None:
    address = ValkeyAddress.parse("unix:///run/valkey%20one/s?db=3&namespace=x")
    assert address.options == {"unix_socket_path": "/run/valkey one/s", "db": 3}
    assert address.shown == "unix:///run/valkey one/s?db=3&namespace=x"


def test_a_password_from_elsewhere() -> None:
    address = ValkeyAddress.parse("valkey://me@bees").with_password("s3cret")
    assert (address.options["username"], address.options["password"]) == ("me", "s3cret")
    assert "s3cret" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret",
        "s3cret:6379",
        "http://s3cret:6379",
        "redis://:s3cret@bees",
        "valkey://",
        "valkey:///0",
        "valkey://:s3cret@",
        "valkey://bees:s3cret",
        "valkey://bees:65536",
        "valkey://bees:-1",
        "valkey://:s3/cret@bees",
        "valkey://:s3#cret@bees",
        "valkey://me:12#s3cret@bees",
        "valkey://me:12?s3cret@bees",
        "valkey://[s3cret",
        "valkey://bees/s3cret",
        "valkey://bees/-1",
        "valkey://bees/1/2",
        "valkey://bees/²",
        "valkey://bees?db=1",
        "valkey://bees?ca=/etc/ca.pem",
        "valkey://bees?password=s3cret",
        "valkey://bees?namespace=",
        "valkey://bees?namespace=a:b",
        "valkey://bees?namespace=a b",
        f"valkey://bees?namespace={'a' * 101}",
        "valkey://bees?lease=0.9",
        "valkey://bees?lease=301",
        "valkey://bees?lease=nan",
        "valkey://bees?lease=soon",
        "unix://s3cret",
        "unix://s3cret/run/valkey",
        "unix:///run/valkey?db=x",
    ],
)
def test_what_is_no_store_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="write valkey://HOST:PORT/DB") as refusal:
        ValkeyAddress.parse(url)
    assert "s3" not in str(refusal.value)
    assert "cret" not in str(refusal.value)
    assert refusal.value.__suppress_context__, "the cause may repeat it"
