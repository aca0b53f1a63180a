"""Snapshots in few bits: near to what was, smaller, and checked as strictly as all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from apiary_server.engine.engine import Engine
from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.compression import RESIDUAL, Compression, compressed
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import Geometry, SlotLayout
from apiary_server.sessions.restored import Restored, restore
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import Image, Manifest, Origin, decode, encode
from buzz import CacheState, Rotary
from tests import tiny
from tests.server.driver import ask, create, session

MakeEngine = Callable[..., Engine]
ORIGIN = Origin("model", "tokenizer")
ROTARY = Rotary.of(32, 1024)
POLICIES = [
    "full(bound=400)",
    "buzz2(sink=2,window=80,hot=120,cells=60,positions=in_cache)",
    "h2o(heavy=100,recent=100,block=8,positions=original)",
    "corm(budget=250,recent=8,queries=8)",
]


@dataclass
class Stored:
    """A session after one turn, and its cache."""

    session: Session
    image: Image

    @property
    def exact(self) -> dict[str, torch.Tensor]:
        return decode(b"".join(encode(self.image, ORIGIN)), ORIGIN)[1]

    def compressed(self, bits: int) -> bytes:
        return b"".join(encode(self.image, ORIGIN, compression=Compression(bits, ROTARY)))  # type: ignore[arg-type]

    def restored(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> Restored:
        return restore(self.session, 1, manifest, tensors, ROTARY)


@pytest.fixture
def stored(make_engine: MakeEngine, tmp_path: Path) -> Callable[..., Stored]:
    """Has a session take a turn."""

    def make(policy: str = POLICIES[0], tokens: int = 350, **settings: object) -> Stored:
        model = tiny.save(tmp_path, tiny.config(head_dim=32))
        engine = make_engine(
            start=False, model=str(model), cache_budget=2**25, workspace_entries=700, **settings
        )
        create(engine, "a", policy)
        ask(engine, [3 + token % 200 for token in range(tokens)], "a", max_tokens=5)
        record = session(engine, "a")
        image = engine._loop.residency.image(record, torch.zeros(record.layout.bytes, dtype=torch.uint8))
        assert image is not None
        return Stored(record, image)

    return make


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("bits", "error"), [(4, 0.1), (2, 0.45)])
def test_what_comes_back_is_near(stored: Callable[..., Stored], policy: str, bits: int, error: float) -> None:
    """The last entries are as they were, the others off by what so few bits cannot tell."""
    before = stored(policy)
    state, exact = before.image.state, before.exact
    assert state is not None
    assert state.n >= RESIDUAL + 60
    assert state.rotated_in_cache is ("original" not in policy)
    data = before.compressed(bits)
    assert len(data) < sum(map(len, encode(before.image, ORIGIN)))
    manifest, tensors = decode(data, ORIGIN)
    assert manifest.bits == bits
    after = before.restored(manifest, tensors)
    assert after.state == state
    assert after.tensors.keys() == exact.keys()
    first = state.n - RESIDUAL
    for name, tensor in exact.items():
        given = after.tensors[name]
        assert (given.dtype, given.shape) == (tensor.dtype, tensor.shape)
        if name not in ("keys", "values"):
            assert torch.equal(given, tensor)
            continue
        assert torch.equal(given[:, :, first:], tensor[:, :, first:])
        off = (given - tensor)[:, :, :first]
        assert 0 < off.norm() < error * tensor[:, :, :first].norm()


def test_below_float32_it_is_rounded_once(stored: Callable[..., Stored]) -> None:
    before = stored(dtype="bfloat16", cache_dtype="bfloat16")
    after = before.restored(*decode(before.compressed(4), ORIGIN))
    for name in ("keys", "values"):
        exact, given = before.exact[name], after.tensors[name]
        assert given.dtype == torch.bfloat16
        assert (given - exact).float().norm() < 0.1 * exact.float().norm()


def test_entries_in_eight_bits_stay_as_they_are(stored: Callable[..., Stored]) -> None:
    before = stored(cache_dtype="int8")
    data = before.compressed(4)
    assert data == b"".join(encode(before.image, ORIGIN))
    manifest, tensors = decode(data, ORIGIN)
    assert manifest.bits is None
    after = before.restored(manifest, tensors)
    assert {name: tensor.dtype for name, tensor in after.tensors.items()}["keys"] == torch.int8
    assert after.tensors.keys() == before.exact.keys()
    assert "scales" in after.tensors
    for name, tensor in before.exact.items():
        assert torch.equal(after.tensors[name], tensor)


def test_it_takes_few_bytes(stored: Callable[..., Stored]) -> None:
    before = stored()
    assert before.image.state is not None
    n = before.image.state.n
    whole = sum(map(len, encode(before.image, ORIGIN)))
    entry, position = 2 * 2 * 2 * 32 * 4, 2 * 2 * 4  # bytes of an entry of two layers and heads, in float32
    for bits in (4, 2):
        few = entry * bits / 32 + 2 * 2 * 2 * 4
        expected = RESIDUAL * entry + (n - RESIDUAL) * few + n * position
        assert len(before.compressed(bits)) == pytest.approx(expected, abs=3000)
        assert len(before.compressed(bits)) < whole / 2


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [("full(bound=400)", 150), ("h2o(heavy=100,recent=100,block=8,kivi=4,residual=20)", 350)],
)
def test_what_is_small_or_quantised_stays_as_it_is(
    stored: Callable[..., Stored], policy: str, tokens: int
) -> None:
    before = stored(policy, tokens)
    data = before.compressed(2)
    assert data == b"".join(encode(before.image, ORIGIN))
    assert b'"bits"' not in data, "earlier workers read it"


def test_what_came_back_is_compressed_to_the_same(stored: Callable[..., Stored]) -> None:
    """Nearly: what was rounded once is not rounded again to something far from it."""
    before = stored()
    assert before.image.state is not None
    state, codes = before.image.state, Compression(4, ROTARY)
    once = before.restored(*decode(before.compressed(4), ORIGIN)).tensors
    _, again = codes.compress(state, once)
    _, first = codes.compress(state, before.exact)
    for name in ("key_codes", "value_codes"):
        assert (first[name] == again[name]).float().mean() > 0.98


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("channels"), "tensors"),
        (lambda t: t.pop("keys"), "tensors"),
        (lambda t: t.update(more=torch.zeros(2)), "tensors"),
        (lambda t: t.update(key_codes=t["key_codes"][..., 1:].contiguous()), "key_codes is"),
        (lambda t: t.update(key_grid=t["key_grid"].float()), r"key_grid is torch\.float32"),
        (lambda t: t.update(channels=t["channels"][1:].contiguous()), "channels is"),
        (lambda t: t.update(keys=t["keys"][:, :, 1:].contiguous()), "keys is"),
        (lambda t: t.update(state=torch.zeros(2)), "tensors"),
        (lambda t: t["position"].fill_(10**6), "positions beyond"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    stored: Callable[..., Stored], change: Callable[[dict[str, torch.Tensor]], object], why: str
) -> None:
    """Someone may have the key, or there is none."""
    before = stored()
    manifest, tensors = decode(before.compressed(4), ORIGIN)
    change(tensors)
    with pytest.raises(SnapshotRefused, match=why) as refusal:
        before.restored(manifest, tensors)
    assert refusal.value.reason is RebuildReason.SNAPSHOT_CORRUPT


def test_codes_may_be_anything(stored: Callable[..., Stored]) -> None:
    """As an exact snapshot's numbers may: it is a cache, if a bad one."""
    before = stored()
    manifest, tensors = decode(before.compressed(4), ORIGIN)
    for name in ("key_grid", "value_grid", "channels"):
        tensors[name].fill_(float("nan"))
    assert before.restored(manifest, tensors).tensors["keys"].isnan().any()


@pytest.mark.parametrize(
    ("update", "counts", "why"),
    [
        ({"bits": 2}, {}, "key_codes is"),
        ({"bits": None}, {}, "no state of"),
        ({}, {"measured": False}, "no state of"),
        ({}, {"packed": 10}, "do not fit"),
        ({}, {"packed": 300}, "do not fit"),
        ({}, {"n": 100, "packed": 0}, "never compressed"),
        ({}, {"n": 128, "packed": 128}, "never compressed"),
        ({}, {"n": 2**31 - 1, "packed": 2**31 - 129}, "no state of"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    stored: Callable[..., Stored], update: dict[str, object], counts: dict[str, int], why: str
) -> None:
    before = stored()
    manifest, tensors = decode(before.compressed(4), ORIGIN)
    assert manifest.counts is not None
    changed = manifest.counts.model_copy(update=counts)
    forged = manifest.model_copy(update={"counts": changed, **update})
    with pytest.raises(SnapshotRefused, match=why) as refusal:
        before.restored(forged, tensors)
    assert refusal.value.reason is RebuildReason.SNAPSHOT_CORRUPT


def test_a_quantised_cache_is_never_compressed(stored: Callable[..., Stored]) -> None:
    before = stored("h2o(heavy=100,recent=100,block=8,kivi=4,residual=20)")
    manifest, tensors = decode(b"".join(encode(before.image, ORIGIN)), ORIGIN)
    assert before.restored(manifest, tensors).state.packed > 0
    with pytest.raises(SnapshotRefused, match="never compressed"):
        before.restored(manifest.model_copy(update={"bits": 4}), tensors)


def test_heads_that_cannot_be_grouped_have_no_such_slot() -> None:
    state = CacheState(200, 0, 200, 0, True, packed=72, measured=True)
    narrow = SlotLayout(Geometry(2, 2, 8, torch.float32), 300, 0)
    with pytest.raises(SnapshotRefused, match="never compressed"):
        compressed(narrow, state, 4)
    wide = replace(narrow, geometry=replace(narrow.geometry, head_dim=64))
    assert compressed(wide, state, 4).packed == 72


def test_only_known_bits_are_read(stored: Callable[..., Stored]) -> None:
    before = stored()
    other = replace(Compression(4, ROTARY), bits=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 or 4 bits"):
        encode(before.image, ORIGIN, compression=other)
    manifest, _ = decode(before.compressed(4), ORIGIN)
    with pytest.raises(ValueError, match="bits"):
        Manifest.model_validate(manifest.model_dump() | {"bits": 3})
