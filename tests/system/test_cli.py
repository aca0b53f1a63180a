"""The `apiary` command before a real worker."""

from __future__ import annotations

import json
from pathlib import Path

from apiary_client import Client, Stopping

from .conftest import Run


def test_generate(apiary: Run, client: Client) -> None:
    text = "Say something."
    whole = client.generate(text, stopping=Stopping(max_tokens=24), timeout=60)
    streamed = apiary("generate", text, "--max-tokens", "24")
    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert streamed.stdout == whole.text + "\n"
    answer = json.loads(apiary("generate", text, "--max-tokens", "24", "--json").stdout)
    assert answer["token_ids"] == list(whole.token_ids)
    assert answer["usage"]["completion_tokens"] == len(whole.token_ids)


def test_generate_refused(apiary: Run) -> None:
    refused = apiary("generate", "hi", "--policy", "buzz(stride=2)")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: policy: ")
    assert refused.stderr.count("\n") == 1


def test_sessions(apiary: Run, client: Client) -> None:
    for name in ("ants", "bees"):
        client.create_session(name, labels={"kind": name})
    client.generate("Hello.", session="bees", stopping=Stopping(max_tokens=8), timeout=30)
    listed = json.loads(apiary("sessions", "list", "--json").stdout)
    assert [(one["name"], one["turn_count"]) for one in listed] == [
        ("sessions/ants", 0),
        ("sessions/bees", 1),
    ]
    shown = json.loads(apiary("sessions", "show", "bees", "--json").stdout)
    assert shown == listed[1]
    assert shown["labels"] == {"kind": "bees"}
    assert 0 < shown["cache"]["entries"] <= shown["cache"]["bound"]
    assert "bees" in apiary("sessions", "list").stdout
    assert apiary("sessions", "delete", "ants", "sessions/bees").returncode == 0
    assert json.loads(apiary("sessions", "list", "--json").stdout) == []
    gone = apiary("sessions", "show", "bees", "--json")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "sessions/bees" in gone.stderr


def test_the_map_of_a_cache(apiary: Run, client: Client, tmp_path: Path) -> None:
    client.create_session("bees", policy="buzz(sink=2,window=8,threshold=20,stride=5)")
    text = "Tell me about honeybees, please."
    answer = client.generate(
        text, session="bees", stopping=Stopping(max_tokens=24, ignore_eos=True), timeout=60
    )
    session = client.get_session("bees")
    picture = tmp_path / "bees.png"
    full = apiary("sessions", "map", "bees", "--full", "--json", "--png", str(picture))
    assert full.returncode == 0
    assert full.stderr.endswith(f"wrote {picture}\n")  # behind what matplotlib says of fonts
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = json.loads(full.stdout)
    seen = session.token_count - 1  # the last token was sampled, and never fed back
    assert (drawn["state"], drawn["entries"], drawn["token_count"]) == (
        "resident",
        session.cache.entries,
        seen,
    )
    transcript = [*client.tokenize(text), *answer.token_ids]
    kept = set()
    for layer in drawn["layers"]:
        for head in layer["heads"]:
            assert len(head["positions"]) == len(head["scores"]) == len(head["kinds"]) == drawn["entries"]
            assert head["positions"][:2] == [0, 1]
            assert head["positions"][-8:] == list(range(seen - 8, seen))
            assert head["kinds"] == sorted(head["kinds"], key=["sink", "sampled", "middle", "window"].index)
            kept |= set(head["positions"])
    assert [token["position"] for token in drawn["tokens"]] == sorted(kept)
    assert all(token["token_id"] == transcript[token["position"]] for token in drawn["tokens"])
    assert "<|im_start|>" in {token["text"] for token in drawn["tokens"]}
    said = apiary("sessions", "map", "bees", "--tokens", "5")
    assert (said.returncode, said.stderr) == (0, "")
    assert "a sampled " in said.stdout
    assert "\x1b" not in said.stdout
    assert len(said.stdout.split("\n\n")[1].splitlines()) == 6
    foreign = apiary("sessions", "map", "bees", "--tenant", "wasps")
    assert (foreign.returncode, foreign.stdout) == (1, "")
    refused = apiary("sessions", "map", "bees", "--layer", "2")
    assert "the model has the layers 0 to 1" in refused.stderr


def test_chat_resumes_with_its_context(apiary: Run, client: Client) -> None:
    flags = ("chat", "--session", "work", "--max-tokens", "16")
    first = apiary(*flags, stdin="My name is Ada.\nI like bees.\n")
    assert (first.returncode, first.stderr) == (0, "")
    assert client.get_session("work").turn_count == 2
    second = apiary(*flags, stdin="What is my name?\n")
    after = client.get_session("work")
    assert after.turn_count == 3

    # the same conversation without a break gives the same answers, and the question alone another
    client.create_session("whole")
    answers = [
        client.generate(text, session="whole", stopping=Stopping(max_tokens=16), timeout=30).text + "\n"
        for text in ("My name is Ada.", "I like bees.", "What is my name?")
    ]
    assert first.stdout == answers[0] + answers[1]
    assert second.stdout == answers[2]
    assert (
        client.generate("What is my name?", stopping=Stopping(max_tokens=16), timeout=30).text + "\n"
        != answers[2]
    )
    whole = client.get_session("whole")
    assert (after.token_count, after.cache) == (whole.token_count, whole.cache)


def test_chat_without_a_name_leaves_nothing(apiary: Run, client: Client) -> None:
    assert apiary("chat", "--max-tokens", "4", stdin="Hi.\n").returncode == 0
    assert list(client.list_sessions()) == []
