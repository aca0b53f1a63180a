"""A reader in a process of its own, so that nothing but the worker can hold it up.

`python -m tests.system.healthy_reader HOST:PORT PROMPT TOKENS` streams one answer after the other. It prints
an empty line when it has its first token, then each answer as JSON; the one that runs at SIGTERM is the last.
"""

from __future__ import annotations

import json
import signal
import sys
import threading

from apiary_client import Client

from .reading import Reading, tokens


def main(target: str, prompt: str, count: str) -> None:
    enough = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: enough.set())
    begun = False
    with Client(target) as client:
        while not enough.is_set():
            reading = Reading()
            for delta in client.stream(prompt, stopping=tokens(int(count)), timeout=60):
                reading.take(delta)
                if not begun:
                    print(flush=True)
                    begun = True
            answer = {"token_ids": reading.token_ids, "text": reading.text, "gap": reading.longest_gap}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
