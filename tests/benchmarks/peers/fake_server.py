"""A server of OpenAI's completions API with no model behind: `fake_server.py DOES --host HOST --port PORT`.

`DOES` is `start` (ends before it is healthy), `sleep` (is never healthy), `refuse` (answers with an error),
`fail` (an error in the middle), `die` (ends at the first request), `short` (one token less) or `well`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers with the prompt's length and the numbers after it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health."""
        self._answer(200 if self.path == "/health" else 404, b"")

    def do_POST(self) -> None:
        """A completion, as server-sent events."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        does = sys.argv[1]
        if does == "die":
            os._exit(4)
        if does == "refuse" or not (request["stream"] and request["return_token_ids"]):
            self._answer(400, b'{"error": "no room"}')
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(request["max_tokens"] - (does == "short")):
            ids = [len(request["prompt"]) + number]
            self._event(json.dumps({"choices": [{"text": "é", "token_ids": ids}]}))
            if does == "fail":
                self._event(json.dumps({"error": {"message": "broken"}}))
                return
        self._event("[DONE]")

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """With room for all who connect at once."""

    request_queue_size = 64


def main() -> None:
    """Serve until a signal."""
    print("a warning\n\nthe cause", file=sys.stderr, flush=True)
    print("what it prints", flush=True)
    match sys.argv[1]:
        case "start":
            sys.exit(3)
        case "sleep":
            time.sleep(60)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    Server(("127.0.0.1", port), Handler).serve_forever()


main()
