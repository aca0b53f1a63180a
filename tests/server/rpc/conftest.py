"""A served fake engine for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from apiary_server.rpc.app import App
from apiary_server.settings import Settings

from .fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    """The engine behind the served app."""
    return FakeEngine()


@pytest.fixture
def settings() -> Settings:
    """A worker's settings, on a free port."""
    return Settings(listen="127.0.0.1:0")


@pytest_asyncio.fixture
async def app(engine: FakeEngine, settings: Settings) -> AsyncIterator[App]:
    """The app, serving."""
    served = App(engine, settings)
    await served.start()
    yield served
    await served.stop(0)


@pytest_asyncio.fixture
async def channel(app: App) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the app."""
    async with grpc.aio.insecure_channel(app.address) as connected:
        yield connected
