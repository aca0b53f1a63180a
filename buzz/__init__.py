"""Bounded KV caches for transformers: policies, the cache, re-rotation and attention with score mass."""

from buzz.attention import attend_chunk, attend_decode
from buzz.cache import Buffers, Cache, CacheState
from buzz.policies.buzz import Buzz
from buzz.policies.full import Full
from buzz.policies.h2o import H2O
from buzz.policies.streaming import Streaming
from buzz.policy import Compaction, Policy, PolicyError, Positions
from buzz.registry import names, parse, register
from buzz.rotary import Rotary

__all__ = [
    "H2O",
    "Buffers",
    "Buzz",
    "Cache",
    "CacheState",
    "Compaction",
    "Full",
    "Policy",
    "PolicyError",
    "Positions",
    "Rotary",
    "Streaming",
    "attend_chunk",
    "attend_decode",
    "names",
    "parse",
    "register",
]
