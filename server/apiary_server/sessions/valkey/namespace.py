"""A namespace of a Valkey server, and who owns it.

One worker owns a namespace at a time. It says so every few seconds (the *lease*, a key that expires). One
that starts waits until a lease that nobody renews has ended, and is refused if it is renewed. Each owner has
an *epoch*, one more than the last, and each write is a script that changes nothing unless the writer is the
owner still: one that was paused, or cut off, for longer than its lease cannot touch what the next one has. A
lease that ended without a successor is had again by who had it.

Keys, all of them NAMESPACE:NAME:

    about      hash     `format` of all this; `tokenizer`, a digest, without which transcripts mean nothing;
                        `epoch`; `owner`: "EPOCH HOST/PROCESS/RANDOM"
    lease      string   the owner, while it says that it lives
    sessions   hash     "TENANT/SESSION" to the session's settings in JSON
    turns:TENANT/SESSION
               list     its turns: each the record in JSON, a newline, and the tokens as 32-bit integers,
                        little-endian
    snapshots  hash     names of snapshots to their bytes
    snapshot:NAME
               string   a snapshot
    incoming:OWNER
               string   a snapshot that is being written; it expires

How durable a write is: `write` returns when the server's append-only file has it on disk (WAITAOF, from
Valkey 7.2; with `appendfsync always` that takes a few milliseconds, with `everysec` up to a second). A server
with `appendonly no`, or an older one, cannot say so: what it was given counts as stored at once, and is lost
with it; that is logged at the start. One that comes back with less than it had, and a replica that became the
primary and had not heard of all, are given everything anew, with the next change.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence

import structlog

from apiary_server.sessions.store import StoreError, StoreForgot
from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.sessions.valkey.server import LARGE_TIMEOUT, TIMEOUT, Refused, Server

_log = structlog.get_logger(__name__)
_FORMAT = 1
_FSYNC = 0.8  # of the timeout
_TAKE = """
local format, tokenizer = unpack(redis.call('HMGET', KEYS[1], 'format', 'tokenizer'))
if format ~= ARGV[3] and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('FORMAT ' .. (format or '?'))
end
if tokenizer and tokenizer ~= ARGV[4] then return redis.error_reply('TOKENIZER ' .. tokenizer) end
local holder = redis.call('GET', KEYS[2])
if holder then return {holder, redis.call('PTTL', KEYS[2])} end
local epoch = math.max(redis.call('HGET', KEYS[1], 'epoch') or 0, ARGV[5]) + 1
local owner = epoch .. ' ' .. ARGV[1]
redis.call('HSET', KEYS[1], 'format', ARGV[3], 'tokenizer', ARGV[4], 'epoch', epoch, 'owner', owner)
redis.call('SET', KEYS[2], owner, 'PX', ARGV[2])
return {owner}
"""
_GUARD = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner then return redis.error_reply('EMPTIED !') end
if owner ~= ARGV[1] then return redis.error_reply('FENCED ' .. owner) end
"""
_RENEW = "redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])"
_RELEASE = "redis.call('DEL', KEYS[2])"


class Namespace:
    """A namespace that this process owns. Thread-safe.

    Args:
        address: where it is.
        tokenizer: a digest of the tokenizer.

    Attributes:
        server: where it is, to read.
        owner: this process, as above; another one since the server had lost everything.

    Raises:
        StoreError: the server cannot be used; another worker owns the namespace, and lives; or what is there
            is of another format, of another tokenizer, or another program's.
    """

    def __init__(self, address: ValkeyAddress, tokenizer: str) -> None:
        self._address = address
        self._tokenizer = tokenizer
        self.server = Server(address)
        self._name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._users = 0
        self._superseded = ""
        self._closed = threading.Event()
        try:
            self._refuse_eviction()
            self._fsyncs = self._can_fsync()
            self.owner = self._take()
        except BaseException:
            self.server.close()
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def key(self, *names: str) -> str:
        """A key of the namespace."""
        return ":".join((self._address.namespace, *names))

    def write(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int],
        *,
        before: Sequence[Sequence[object]] = (),
        large: bool = False,
        durable: bool = True,
    ) -> None:
        """Run a script if this process owns the namespace still.

        Args:
            script: Lua, which says beforehand what it cannot do: nothing is taken back. KEYS[1] is `about`,
                KEYS[2] the lease, ARGV[1] the owner, ARGV[2] how many milliseconds a lease has.
            keys: the others.
            arguments: the others.
            before: commands on keys that only this process has.
            large: wait longer, since it is much.
            durable: wait until it is on disk, where the server can say that.

        Raises:
            StoreForgot: the server has lost what it had.
            StoreError: another worker owns the namespace, or the server refused it, and nothing was changed;
                or it does not answer, or its disk is slow, and nobody knows.
        """
        if self._superseded:
            raise self.server.error(self._superseded)
        owner, commands = self.owner, [*before]
        commands.append(self._command(_GUARD + script, owner, keys, arguments))
        if durable and self._fsyncs:
            patience = _FSYNC * (LARGE_TIMEOUT if large else TIMEOUT)
            commands.append(("WAITAOF", 1, 0, int(1000 * patience)))
        try:
            *_, last = self.server.ask(*commands, large=large)
        except Refused as error:
            raise self._verdict(error, owner) from error
        if durable and self._fsyncs and last[0] < 1:
            raise self.server.error(
                "what was written is not on its disk yet: that is slow, or appendfsync no"
            )

    def join(self) -> None:
        """Have it kept until one more has left."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """Use it no longer; the last who leaves lets others own it."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._closed.set()
        self._thread.join()
        try:
            self.write(_RELEASE, (), (), durable=False)
        except StoreError as error:
            _log.warning("the lease is not given back: it ends by itself", reason=str(error))
        self.server.close()

    def _command(
        self, script: str, owner: str, keys: Sequence[str] = (), arguments: Sequence[str | bytes | int] = ()
    ) -> Sequence[object]:
        all_keys = (self.key("about"), self.key("lease"), *keys)
        return ("EVAL", script, len(all_keys), *all_keys, owner, int(1000 * self._address.lease), *arguments)

    def _take(self) -> str:
        """Own the namespace, as soon as it is certain that its last owner has gone."""
        known = None
        while True:
            owner, *left = self._try()
            if not left:
                return owner
            if known is not None and left[0] > known:
                raise self.server.error(
                    f"in use by another worker ({_shown(owner)}): end that one, or name another namespace"
                )
            if known is None:
                _log.info("the store has an owner: waiting whether it lives", owner=_shown(owner))
            known = left[0]
            time.sleep(self._address.lease / 20)

    def _try(self, epoch: int = 0) -> tuple[str, *tuple[int, ...]]:
        """The owner that this process is now; or another one, and how many milliseconds it has left.

        Args:
            epoch: the last that this process had.
        """
        arguments = (_FORMAT, self._tokenizer, epoch)
        try:
            ((owner, *left),) = self.server.ask(self._command(_TAKE, self._name, (), arguments))
        except Refused as error:
            raise self._verdict(error, "") from error
        return owner.decode(), *left

    def _verdict(self, error: Refused, owner: str) -> StoreError:
        """What a script's refusal means."""
        match error.code:
            case "FENCED" if not error.rest.endswith(self._name):
                self._superseded = (
                    f"another worker ({_shown(error.rest)}) has taken the sessions over, since this one was "
                    f"not heard of for {self._address.lease:g} s: what changes here is lost, so end it"
                )
                return self.server.error(self._superseded)
            case "EMPTIED" | "FENCED":  # or another thread was quicker
                self._own_anew(owner)
                return StoreForgot(
                    f"{self._address.shown}: what was stored is gone: the server was emptied, or it came "
                    "back and keeps nothing on disk (appendonly yes); what is in memory is stored anew"
                )
            case "FORGOT":
                return StoreForgot(
                    f"{self._address.shown}: some of what was stored is gone: the server came back with "
                    "less than it had; what is in memory is stored anew"
                )
            case "FORMAT" if error.rest.isdecimal():
                return self.server.error(
                    f"what is there has format {error.rest}, and this worker knows {_FORMAT}: use a newer "
                    "apiary, or another namespace"
                )
            case "FORMAT" | "WRONGTYPE":
                return self.server.error("what is there is another program's: choose another namespace")
            case "TOKENIZER":
                return self.server.error(
                    "the sessions there are of a model with another tokenizer: serve that model, "
                    "or choose another namespace"
                )
        return error

    def _own_anew(self, before: str) -> None:
        """Nobody owns the namespace, which is empty: own it again, unless another thread did; or another
        worker, which the next write will find."""
        with self._lock:
            if self.owner == before:
                owner, *left = self._try(_epoch(before))
                if not left:
                    self.owner = owner

    def _renew(self) -> None:
        failing = False
        while not self._closed.wait(self._address.lease / 3):
            try:
                self.write(_RENEW, (), (), durable=False)
                failing = False
            except StoreError as error:
                if self._superseded:
                    _log.critical("nothing is stored any more", reason=str(error))
                    return
                if not failing:
                    _log.warning("another worker may take over: the lease is not renewed", reason=str(error))
                failing = True

    def _refuse_eviction(self) -> None:
        (memory,) = self.server.ask(("INFO", "memory"))
        policy = memory.get("maxmemory_policy", "")
        if policy.startswith("allkeys"):
            raise self.server.error(
                f"it throws keys away when it is full (maxmemory-policy {policy}), and sessions with them: "
                "set noeviction"
            )

    def _can_fsync(self) -> bool:
        try:
            self.server.ask(("WAITAOF", 1, 0, 1))
        except Refused as error:
            _log.warning("what is stored may be lost with the server, which keeps no log", reason=str(error))
            return False
        return True


def _shown(owner: str) -> str:
    host, process, _ = owner.partition(" ")[2].rsplit("/", 2)
    return f"process {process} on {host}, epoch {_epoch(owner)}"


def _epoch(owner: str) -> int:
    return int(owner.partition(" ")[0])
