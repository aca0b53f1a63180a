"""Places in the queue: taken at once, given back once."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from apiary_server.engine.places import Places
from apiary_server.errors import QueueFull

LIMIT = 50


def at_most(tenant: str, taken: Mapping[str, int]) -> None:
    if sum(taken.values()) >= LIMIT:
        raise QueueFull(f"{tenant} is refused", 1.0)


def test_who_is_checked_sees_what_is_taken() -> None:
    places, seen = Places(), []
    for tenant in "aab":
        places.take(tenant, lambda tenant, taken: seen.append((tenant, dict(taken))))
    assert seen == [("a", {}), ("a", {"a": 1}), ("b", {"a": 2})]
    assert len(places) == 3


def test_a_refusal_takes_nothing() -> None:
    places = Places()
    taken = [places.take("a", at_most) for _ in range(LIMIT)]
    with pytest.raises(QueueFull):
        places.take("b", at_most)
    assert len(places) == LIMIT
    taken[0].release()
    taken[0].release()
    assert len(places) == LIMIT - 1
    places.take("b", at_most)


def test_tenants_without_places_are_forgotten() -> None:
    places, seen = Places(), []
    for number in range(3):
        places.take(f"tenant-{number}", at_most).release()
    places.take("a", lambda _, taken: seen.append(dict(taken)))
    assert seen == [{}]


def test_many_threads_take_no_more_than_there_are() -> None:
    places, refused = Places(), []

    def take(number: int) -> None:
        for _ in range(200):
            try:
                place = places.take(f"tenant-{number}", at_most)
            except QueueFull as refusal:
                refused.append(refusal)
            else:
                assert len(places) <= LIMIT
                if number % 2:
                    place.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == LIMIT
    assert refused
