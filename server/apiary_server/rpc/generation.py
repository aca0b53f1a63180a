"""GenerationService."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from apiary.v1 import generation_pb2 as pb
from apiary.v1.generation_pb2_grpc import GenerationServiceServicer
from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.places import Place
from apiary_server.engine.result import Delta
from apiary_server.errors import QueueFull, SessionBusy
from apiary_server.rpc.caller import Caller, Context, caller
from apiary_server.rpc.convert import incoming, outgoing
from apiary_server.settings import Settings

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine

_NEWS = 0.05  # seconds that the news of a caller's leaving may take


class GenerationService(GenerationServiceServicer):
    """Runs turns on the engine, which knows nothing of gRPC, and hands on what comes of them."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        if request.on_cancel == pb.ON_CANCEL_KEEP:  # nothing is delivered before the end
            request.on_cancel = pb.ON_CANCEL_DISCARD
        whole = Delta()
        async with contextlib.aclosing(self._turn(request, context)) as deltas:
            async for delta in deltas:
                whole.merge(delta)
        return outgoing.response(whole)

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async with contextlib.aclosing(self._turn(request, context)) as deltas:
            async for delta in deltas:
                yield outgoing.stream_response(delta)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        caller(context)
        ids = await asyncio.to_thread(self._engine.tokenize, incoming.tokenize_input(request))
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        caller(context)
        longest = self._engine.model.max_prompt_tokens
        ids = incoming.token_ids(request.token_ids, "token_ids", longest).ids
        return pb.DetokenizeResponse(text=await asyncio.to_thread(self._engine.detokenize, ids))

    async def _turn(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[Delta, None]:
        stream = TokenStream(
            asyncio.get_running_loop(), self._settings.stream_tokens, self._settings.stall_limit
        )
        # A caller can leave while the turn is still being opened in the thread, where no cancellation
        # reaches: the engine drops a turn whose stream is closed.
        context.add_done_callback(lambda _: stream.close())  # type: ignore[arg-type]  # the stub wants a class
        try:
            who = caller(context)
            # here: refusals must not queue for a thread behind those who tokenise
            place = self._engine.reserve(who.tenant)
            # shielded: the place must be given back even if the caller leaves before a thread is free
            opening = asyncio.ensure_future(self._open(request, who, stream, place))
            # asyncio would log an error that nobody is left to hear
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(opening)
            # Not earlier: a client retries a refused call by itself only if no headers came before.
            await context.send_initial_metadata(())
            async for delta in stream:
                yield delta
        finally:
            stream.close()

    async def _open(
        self, request: pb.GenerateRequest, who: Caller, stream: TokenStream, place: Place
    ) -> None:
        try:
            queued = await asyncio.to_thread(self._begin, request, who, stream, place)
        except SessionBusy as busy:
            # A caller that left a stream and asks again at once may be here before the news that it left.
            await asyncio.sleep(_NEWS)
            if stream.closed:
                raise
            try:
                place = self._engine.reserve(who.tenant)
            except QueueFull:
                raise busy from None
            queued = await asyncio.to_thread(self._begin, request, who, stream, place)
        await asyncio.wrap_future(queued)

    def _begin(
        self, request: pb.GenerateRequest, who: Caller, stream: TokenStream, place: Place
    ) -> Future[None]:
        try:
            turn = incoming.turn_request(request, who, self._engine.model.max_prompt_tokens)
        except BaseException:
            place.release()
            raise
        return self._engine.open(turn, stream, place)
