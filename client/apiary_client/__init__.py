"""Clients of an Apiary worker: `Client`, and `apiary_client.aio.Client` for asyncio.

    from apiary_client import Client

    with Client("127.0.0.1:50051") as client:
        session = client.create_session()
        for delta in client.stream("What is a honeycomb?", session=session):
            print(delta.text, end="", flush=True)

Each method and type is in `client.py`, `types.py` and `cache_map.py`; what can go wrong is in `errors.py`.
"""

from apiary_client import aio
from apiary_client.cache_map import (
    CacheMap,
    EntryKind,
    HeadMap,
    KeptToken,
    KindCount,
    LayerMap,
    MapColumn,
)
from apiary_client.channel import TLS
from apiary_client.client import Client
from apiary_client.errors import ApiaryError
from apiary_client.types import (
    CacheUsage,
    Capacity,
    Chat,
    Chunk,
    Completion,
    Delta,
    FinishReason,
    Message,
    Model,
    OnCancel,
    RebuildReason,
    Role,
    Sampling,
    Session,
    State,
    Stopping,
    TokenLogprob,
    TopLogprob,
    TurnOptions,
    Usage,
    WhenBusy,
)

__all__ = [
    "TLS",
    "ApiaryError",
    "CacheMap",
    "CacheUsage",
    "Capacity",
    "Chat",
    "Chunk",
    "Client",
    "Completion",
    "Delta",
    "EntryKind",
    "FinishReason",
    "HeadMap",
    "KeptToken",
    "KindCount",
    "LayerMap",
    "MapColumn",
    "Message",
    "Model",
    "OnCancel",
    "RebuildReason",
    "Role",
    "Sampling",
    "Session",
    "State",
    "Stopping",
    "TokenLogprob",
    "TopLogprob",
    "TurnOptions",
    "Usage",
    "WhenBusy",
    "aio",
]
