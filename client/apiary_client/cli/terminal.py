"""The chat of a person at a terminal: a prompt, streaming answers, a few commands."""

from __future__ import annotations

from contextlib import suppress

from rich.text import Text

from apiary_client.cli import console, session_table
from apiary_client.cli.conversation import Conversation
from apiary_client.errors import ApiaryError
from apiary_client.types import Usage

with suppress(ImportError):  # not on every platform; with it `input` has line editing and a history
    import readline  # noqa: F401

_HELP = """\
/info    the session: turns, tokens, what its cache holds
/help    this
/quit    leave; so do Ctrl-D, and Ctrl-C at the prompt
Ctrl-C   while an answer comes: cancel it; the session is then as before the turn"""


def run(conversation: Conversation, target: str) -> None:
    """Chat until the person leaves. A failed turn is told, and the chat goes on."""
    model = conversation.client.get_model()
    greeting = f"{model.name} at {target}, {conversation.session.policy}; /help helps"
    console.out.print(Text(greeting, style="dim"))
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.out.print()
            return
        try:
            match line:
                case "":
                    pass
                case "/quit":
                    return
                case "/help":
                    console.out.print(_HELP)
                case "/info":
                    console.table(
                        session_table.details(conversation.client.get_session(conversation.session))
                    )
                case _ if line.startswith("/"):
                    console.out.print(f"no command {line.split()[0]}; /help lists them")
                case _:
                    _turn(conversation, line)
        except ApiaryError as error:
            console.complain(console.explain(error, target))


def _turn(conversation: Conversation, text: str) -> None:
    try:
        usage = console.answer(conversation.ask(text))
    except KeyboardInterrupt:
        console.note("cancelled; the session is as before this turn")
    else:
        if usage is not None:
            console.note(_cost(usage))


def _cost(usage: Usage) -> str:
    parts = [f"{usage.completion_tokens} tokens"]
    if usage.decode_time > 0 and usage.completion_tokens > 1:
        parts.append(f"{(usage.completion_tokens - 1) / usage.decode_time:.1f} tokens/s")
    parts.append(f"first after {usage.queue_time + usage.prefill_time:.2f} s")
    parts.append(f"{usage.cached_tokens} tokens of history not computed again")
    if usage.rebuild_reason is not None:
        parts.append(f"cache rebuilt: {usage.rebuild_reason}")
    return " · ".join(parts)
