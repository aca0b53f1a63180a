"""`apiary generate`."""

from __future__ import annotations

import json

from ..conftest import Run
from ..fake_worker import FakeWorker


def test_an_answer_is_printed(apiary: Run, worker: FakeWorker) -> None:
    done = apiary(
        "generate", "hello", "--system", "Be brief.", "--stop", "a", "--stop", "b", "--policy", "full"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "turn 1: hello\n", "")
    (request,) = worker.requests
    assert [message.content for message in request.messages.messages] == ["Be brief.", "hello"]
    assert (list(request.stopping.stop), request.policy) == (["a", "b"], "full")


def test_priority(apiary: Run, worker: FakeWorker) -> None:
    apiary("generate", "hello")
    apiary("generate", "hello", "--priority", "-7")
    assert [request.priority for request in worker.requests] == [0, -7]
    assert apiary("generate", "hello", "--priority", "101").returncode == 2


def test_raw_text_is_continued(apiary: Run, worker: FakeWorker) -> None:
    apiary("generate", "--raw", "Once upon")
    assert worker.requests[0].text == "Once upon"


def test_raw_text_has_no_system_message(apiary: Run, worker: FakeWorker) -> None:
    done = apiary("generate", "--raw", "--system", "x", "Once upon")
    assert (done.returncode, worker.requests) == (2, [])
    assert "leave out --raw" in done.stderr


def test_text_comes_from_stdin(apiary: Run) -> None:
    assert apiary("generate", "-", stdin="two\nlines").stdout == "turn 1: two\nlines\n"


def test_a_turn_of_a_session(apiary: Run) -> None:
    done = apiary("generate", "--session", "nobody", "hello")
    assert done.returncode == 1
    assert done.stderr == "error: no session 'sessions/nobody' (`apiary sessions list` shows yours)\n"


def test_json_is_for_programs(apiary: Run) -> None:
    answer = json.loads(apiary("generate", "--json", "büzz").stdout)
    assert (answer["text"], answer["finish_reason"]) == ("turn 1: büzz", "length")
    assert answer["token_ids"] == [0, 1, 2]
    assert (answer["usage"]["seed"], answer["usage"]["rebuild_reason"]) == (2**63, "model_changed")
    assert answer["logprobs"] == [{"token_id": 7, "logprob": -1.5, "top": [{"token_id": 5, "logprob": -0.5}]}]


def test_bytes_that_are_no_text_are_told(process: Run) -> None:
    done = process("generate", "-", stdin=b"caf\xe9")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the text is not valid UTF-8\n")


def test_patience_has_an_end(apiary: Run) -> None:
    done = apiary("generate", "--timeout", "0.3", "slow please")
    assert done.returncode == 1
    assert done.stderr.endswith("(allow it more with --timeout)\n")


def test_the_tenant_is_sent(apiary: Run, worker: FakeWorker) -> None:
    apiary("generate", "hello", "--tenant", "bees")
    apiary("generate", "hello", APIARY_TENANT="wasps")
    assert [metadata["x-apiary-tenant"] for metadata in worker.metadata] == ["bees", "wasps"]


def test_a_bad_connection_is_told(apiary: Run) -> None:
    done = apiary("generate", "hello", "--tls-root-file", "/nothing.pem")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/nothing.pem" in done.stderr
    assert "printable ASCII" in apiary("generate", "hello", "--tenant", "ä").stderr


def test_a_worker_without_tls_is_unavailable_over_tls(apiary: Run) -> None:
    done = apiary("generate", "hello", "--tls", "--timeout", "10")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")
