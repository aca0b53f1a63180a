"""A real worker process with a fake engine, for tests of how a process starts and ends.

Run as `python -m tests.server.fake_worker_process COUNT PACE DRAIN_GRACE`: answers have COUNT tokens, PACE
seconds apart. The policy `break` makes the engine lose its health.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future

from apiary_server import main
from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.places import Place
from apiary_server.engine.request import TurnRequest
from apiary_server.settings import Settings
from tests.server.rpc.fake_engine import FakeEngine


class Breakable(FakeEngine):
    """An engine that breaks when it is told to."""

    def open(self, request: TurnRequest, stream: TokenStream, place: Place) -> Future[None]:
        """As ever, or break."""
        if request.policy == "break" and self.on_unhealthy is not None:
            self.healthy = False
            self.on_unhealthy()
        return super().open(request, stream, place)


if __name__ == "__main__":
    engine = Breakable()
    engine.count, engine.pace = int(sys.argv[1]), float(sys.argv[2])
    main._build = lambda settings, observer: engine  # type: ignore[assignment, return-value]
    main.serve(Settings(listen="127.0.0.1:0", drain_grace=float(sys.argv[3]), log_format="json"))
