"""Bounded KV caches for transformers: policies, the cache, re-rotation and attention with score mass."""

from buzz.attention import Record, attend_chunk, attend_decode
from buzz.buffers import Buffers
from buzz.cache import Cache, CacheState
from buzz.policies.buzz import Buzz
from buzz.policies.buzz2 import Buzz2
from buzz.policies.cascade import Cascade
from buzz.policies.corm import Corm
from buzz.policies.elastic import Elastic
from buzz.policies.full import Full
from buzz.policies.h2o import H2O
from buzz.policies.streaming import Streaming
from buzz.policies.window import Window
from buzz.policy import MAX_STATES, Compaction, Policy, PolicyError, Positions, State, View
from buzz.regions import Kind, Region
from buzz.registry import names, parse, register
from buzz.rotary import Rotary

__all__ = [
    "H2O",
    "MAX_STATES",
    "Buffers",
    "Buzz",
    "Buzz2",
    "Cache",
    "CacheState",
    "Cascade",
    "Compaction",
    "Corm",
    "Elastic",
    "Full",
    "Kind",
    "Policy",
    "PolicyError",
    "Positions",
    "Record",
    "Region",
    "Rotary",
    "State",
    "Streaming",
    "View",
    "Window",
    "attend_chunk",
    "attend_decode",
    "names",
    "parse",
    "register",
]
