"""ModelService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apiary.v1 import model_pb2 as pb
from apiary.v1.model_pb2_grpc import ModelServiceServicer
from apiary_server.rpc.caller import Context, caller
from apiary_server.rpc.convert import incoming, outgoing

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine


class ModelService(ModelServiceServicer):
    """Tells what is served, and how much of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        caller(context)
        incoming.check_model_name(request, self._engine.model)
        return outgoing.model(self._engine.model)

    async def GetCapacity(self, request: pb.GetCapacityRequest, context: Context) -> pb.Capacity:
        caller(context)
        return outgoing.capacity(self._engine.capacity())
