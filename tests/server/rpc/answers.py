"""What a call came to: its status and details, unpacked for assertions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass
class Answer:
    """The end of a call. Of `details`, the messages by name."""

    code: grpc.StatusCode
    message: str
    responses: list[bytes]
    details: dict[str, Message] = field(default_factory=dict)
    trailer_bytes: int = 0  # at most, as sent: the message percent-encoded, the details in base64

    @property
    def reason(self) -> str:
        """The ErrorInfo's reason; "" if there is none."""
        info = self.details.get("ErrorInfo")
        return "" if info is None else info.reason

    @property
    def fields(self) -> list[str]:
        """The paths of the BadRequest's violations."""
        bad = self.details.get("BadRequest")
        return [] if bad is None else [violation.field for violation in bad.field_violations]


async def ask(
    channel: grpc.aio.Channel, method: str, payload: bytes | Message, metadata: Metadata = ()
) -> Answer:
    """Send raw bytes to a method, unary or server-streaming, and collect all that comes back."""
    data = payload if isinstance(payload, bytes) else payload.SerializeToString()
    call = channel.unary_stream(method)(data, metadata=tuple(metadata), timeout=20)
    responses: list[bytes] = []
    try:
        async for response in call:
            responses.append(response)  # noqa: PERF401 (what came before an error counts)
    except grpc.aio.AioRpcError as error:
        answer = Answer(error.code(), error.details() or "", responses)
        details = sum(len(key) + len(value) for key, value in error.trailing_metadata())
        answer.trailer_bytes = 3 * len(answer.message.encode()) + details * 4 // 3
    else:
        return Answer(grpc.StatusCode.OK, "", responses)
    status = await rpc_status.aio.from_call(call)
    for packed in status.details if status is not None else ():
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        answer.details[type(detail).__name__] = detail
    return answer
