"""The format of snapshots: what was written comes back bit for bit, or is refused, whatever was done."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from apiary_server.engine.engine import Engine
from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.compression import Compression
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import SlotLayout
from apiary_server.sessions.snapshot import VERSION, Image, Origin, check, decode, encode, fill
from buzz import Rotary
from tests import tiny
from tests.server.driver import ask, create, session

MakeEngine = Callable[..., Engine]
ORIGIN = Origin("model", "tokenizer")
POLICIES = [
    "buzz(sink=2,window=8,threshold=20)",
    "buzz2(sink=2,window=8,hot=10,cells=8)",
    "full(bound=200)",
    "corm(budget=40,recent=8,queries=8)",
    "elastic(heavy=30)",
]
HEAD = 24


def image_of(engine: Engine, policy: str, tokens: int = 90) -> Image:
    """A session's cache after a turn."""
    create(engine, "a", policy)
    ask(engine, list(range(3, 3 + tokens)), "a", max_tokens=5)
    record = session(engine, "a")
    memory = torch.full((record.layout.bytes,), 99, dtype=torch.uint8)
    image = engine._loop.residency.image(record, memory)
    assert image is not None
    return image


@pytest.fixture
def image(make_engine: MakeEngine) -> Image:
    """A small one."""
    return image_of(make_engine(start=False), POLICIES[0])


@pytest.fixture
def snapshot(image: Image) -> bytes:
    return b"".join(encode(image, ORIGIN))


@pytest.fixture(params=["exact", "compressed"])
def either(request: pytest.FixtureRequest, make_engine: MakeEngine, tmp_path: Path) -> bytes:
    """A small snapshot of each kind."""
    if request.param == "exact":
        return b"".join(encode(image_of(make_engine(start=False), POLICIES[0]), ORIGIN))
    narrow = tiny.config(num_hidden_layers=1, num_key_value_heads=1, head_dim=32)
    engine = make_engine(
        start=False, model=str(tiny.save(tmp_path, narrow)), dtype="bfloat16", cache_dtype="bfloat16"
    )
    whole = image_of(engine, "full(bound=200)", tokens=170)
    data = b"".join(encode(whole, ORIGIN, compression=Compression(2, Rotary.of(32, 1024))))
    assert decode(data, ORIGIN)[0].bits == 2
    return data


def live(image: Image, slot: torch.Tensor) -> dict[str, torch.Tensor]:
    views, n = image.layout.views(slot[None]), image.state.n
    return {
        "keys": views["keys"][0, :, :, : n - image.state.packed],
        "values": views["values"][0, :, :, : n - image.state.packed],
        "position": views["position"][0, :, :, :n],
        **({"state": views["state"][0, ..., :n]} if "state" in views else {}),
        **{
            name: views[name][0, :, :, : image.state.packed]
            for name in ("key_codes", "value_grid")
            if name in views
        },
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("key", [None, b"a key of sixteen"])
def test_what_was_written_comes_back(make_engine: MakeEngine, policy: str, key: bytes | None) -> None:
    image = image_of(make_engine(start=False, default_max_tokens=8), policy)
    origin = replace(ORIGIN, key=key)
    manifest, tensors = decode(b"".join(encode(image, origin)), origin)
    assert (manifest.policy, manifest.turns, manifest.history) == (image.policy, 1, image.history)
    assert manifest.counts.state == image.state
    assert manifest.signed is (key is not None)
    check(image.layout, image.state, tensors)
    slot = torch.zeros(image.layout.bytes, dtype=torch.uint8)
    fill(slot, image.layout, image.state, tensors)
    before, after = live(image, image.slot), live(image, slot)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["keys"].any(), "or nothing was compared"


@pytest.mark.parametrize("tokens", [20, 150])
def test_quantised_caches_come_back(tmp_path: Path, make_engine: MakeEngine, tokens: int) -> None:
    """Before anything is quantised, and after."""
    model = tiny.save(tmp_path, tiny.config(head_dim=32))
    policy = "h2o(heavy=24,recent=40,block=8,kivi=4,residual=4)"
    image = image_of(make_engine(start=False, model=str(model), cache_budget=2**24), policy, tokens)
    assert image.state.measured is (image.state.packed > 0) is (tokens > 100)
    _, tensors = decode(b"".join(encode(image, ORIGIN)), ORIGIN)
    check(image.layout, image.state, tensors)
    slot = torch.zeros(image.layout.bytes, dtype=torch.uint8)
    fill(slot, image.layout, image.state, tensors)
    before, after = live(image, image.slot), live(image, slot)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_what_is_in_use_is_written(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    small = image_of(engine, "full(bound=400)", tokens=20)
    size = sum(map(len, encode(small, ORIGIN)))
    assert size < small.layout.bytes * 25 / 400 * 1.5 + 2048


def test_another_slot_may_be_larger(image: Image, snapshot: bytes) -> None:
    larger = replace(image.layout, capacity=image.layout.capacity + 50)
    _, tensors = decode(snapshot, ORIGIN)
    slot = torch.zeros(larger.bytes, dtype=torch.uint8)
    fill(slot, larger, image.state, tensors)
    assert torch.equal(live(image, image.slot)["keys"], live(replace(image, layout=larger), slot)["keys"])


def test_every_truncation_is_refused(either: bytes) -> None:
    for length in range(len(either)):
        with pytest.raises(SnapshotRefused) as refusal:
            decode(either[:length], ORIGIN)
        assert refusal.value.reason is RebuildReason.SNAPSHOT_CORRUPT
    with pytest.raises(SnapshotRefused):
        decode(either + b"\0", ORIGIN)


def test_every_flipped_bit_is_refused(either: bytes) -> None:
    rng = random.Random(11)
    places = [rng.randrange(8 * len(either)) for _ in range(10_000)]
    for bit in [*places, *range(8 * 700)]:
        data = bytearray(either)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SnapshotRefused) as refusal:
            decode(bytes(data), ORIGIN)
        assert refusal.value.reason is RebuildReason.SNAPSHOT_CORRUPT


@pytest.mark.parametrize("other", [replace(ORIGIN, model="m"), replace(ORIGIN, tokenizer="t")])
def test_another_model_s_is_refused(snapshot: bytes, other: Origin) -> None:
    manifest, _ = decode(snapshot, other)
    with pytest.raises(SnapshotRefused, match=r"another (model|tokenizer)") as refusal:
        other.check(manifest)
    assert refusal.value.reason is RebuildReason.MODEL_CHANGED


def test_signatures_are_demanded_and_checked(image: Image, snapshot: bytes) -> None:
    keyed, other = replace(ORIGIN, key=b"k" * 32), replace(ORIGIN, key=b"l" * 32)
    signed = b"".join(encode(image, keyed))
    decode(signed, keyed)
    for data, origin in ((snapshot, keyed), (signed, other), (signed, ORIGIN)):
        with pytest.raises(SnapshotRefused, match=r"not signed|seal is broken"):
            decode(data, origin)


def test_another_version_is_refused(snapshot: bytes) -> None:
    newer = snapshot[:16] + struct.pack("<I", VERSION + 1) + snapshot[20:]
    with pytest.raises(SnapshotRefused, match=f"format {VERSION + 1}, and this worker knows {VERSION}"):
        decode(newer, ORIGIN)


def test_no_length_in_a_file_is_believed() -> None:
    huge = b"apiary snapshot\n" + struct.pack("<II", VERSION, 2**32 - 1) + bytes(100)
    with pytest.raises(SnapshotRefused, match="cut off"):
        decode(huge, ORIGIN)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("position"), "tensors"),
        (lambda t: t.update(more=torch.zeros(2)), "tensors"),
        (lambda t: t.update(keys=t["keys"].half()), r"keys is torch\.float16"),
        (lambda t: t.update(keys=t["keys"][:, :, 1:].contiguous()), "keys is"),
        (lambda t: t["position"].fill_(10**6), "positions beyond"),
        (lambda t: t["position"].fill_(-1), "positions beyond"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    image: Image, snapshot: bytes, change: Callable[[dict[str, torch.Tensor]], object], why: str
) -> None:
    """Someone may have the key, or there is none."""
    tensors = dict(decode(snapshot, ORIGIN)[1])
    change(tensors)
    with pytest.raises(SnapshotRefused, match=why):
        check(image.layout, image.state, tensors)


@pytest.mark.parametrize("counts", [{"n": 500}, {"packed": 3}, {"seen": 7}, {"n": 2**31 - 1, "evicted": 0}])
def test_counts_that_do_not_fit_are_refused(image: Image, snapshot: bytes, counts: dict[str, int]) -> None:
    state = replace(image.state, **counts)
    if "n" in counts:
        state = replace(state, seen=state.n + state.evicted)
    with pytest.raises(SnapshotRefused, match=r"do not fit|no state|should have|should be"):
        check(image.layout, state, decode(snapshot, ORIGIN)[1])


def test_the_tensors_are_safetensors(image: Image, snapshot: bytes) -> None:
    """Whoever skips the head can read them with that library alone."""
    (length,) = struct.unpack_from("<I", snapshot, 20)
    tensors = decode(snapshot, ORIGIN)[1]
    assert snapshot[HEAD + length + 32 :] == save(dict(tensors))
    assert isinstance(image.layout, SlotLayout)
