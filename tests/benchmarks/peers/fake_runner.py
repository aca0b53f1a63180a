"""A program that speaks as `runner.py` does, with no engine behind: `fake_runner.py ENGINE SETTINGS`.

`SETTINGS` has what it `does`: `start` (ends before it is ready), `sleep` (is never ready), `die` (ends at the
first request), `refuse` (answers with errors), `short` (one token less).
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Run until stdin ends."""
    settings = json.loads(sys.argv[2])
    does = settings.get("does")
    print("a warning\n\nthe cause", file=sys.stderr, flush=True)
    if does == "start":
        sys.exit(3)
    if does == "sleep":
        time.sleep(60)
    ready = {"version": "7", "weights": "float32", "cache": "f16", "settings": sys.argv[1], "positions": 500}
    print(json.dumps({"ready": ready}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "forget" in request:
            print(f"forget {request['forget']}", file=sys.stderr, flush=True)
            continue
        if does == "die":
            sys.exit(4)
        say = {"id": request["id"]}
        if does == "refuse":
            print(json.dumps(say | {"error": "no room"}), flush=True)
            continue
        for number in range(request["output"] - (does == "short")):
            print(json.dumps(say | {"tokens": [len(request["tokens"]) + number]}), flush=True)
        print(json.dumps(say | {"end": True}), flush=True)


main()
