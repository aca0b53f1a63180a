"""The model and its capacity over a real socket."""

from __future__ import annotations

import dataclasses

import grpc
import pytest

from apiary.v1 import model_pb2 as pb
from apiary.v1.model_pb2_grpc import ModelServiceStub

from .fake_engine import CAPACITY, MODEL


@pytest.mark.parametrize("name", ["", "models/fake"])
async def test_model(channel: grpc.aio.Channel, name: str) -> None:
    model = await ModelServiceStub(channel).GetModel(pb.GetModelRequest(name=name))
    assert model.name == "models/fake"
    for field in dataclasses.fields(MODEL):
        if field.name != "name":
            value, expected = getattr(model, field.name), getattr(MODEL, field.name)
            assert (tuple(value) if isinstance(expected, tuple) else value) == expected


async def test_capacity(channel: grpc.aio.Channel) -> None:
    capacity = await ModelServiceStub(channel).GetCapacity(pb.GetCapacityRequest())
    names = [field.name for field in pb.Capacity.DESCRIPTOR.fields]
    assert {name: getattr(capacity, name) for name in names} == dataclasses.asdict(CAPACITY)
