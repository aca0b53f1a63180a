"""Two conversations side by side, two turns each. Usage: python chat_asyncio.py [HOST:PORT]"""

import asyncio
import sys

from apiary_client import ApiaryError, Stopping, aio


async def converse(client: aio.Client, colour: str) -> list[str]:
    """Tell a fresh session a colour, ask for it, and return both answers."""
    session = await client.create_session(ttl=600)
    try:
        answers = []
        for text in (f"My favourite colour is {colour}.", "What is my favourite colour?"):
            deltas = client.stream(text, session=session, stopping=Stopping(max_tokens=64), timeout=120)
            answers.append("".join([delta.text async for delta in deltas]))
        return answers
    finally:
        await client.delete_session(session)


async def main(target: str) -> None:
    async with aio.Client(target) as client:
        colours = ("teal", "crimson")
        conversations = await asyncio.gather(*(converse(client, colour) for colour in colours))
        for colour, answers in zip(colours, conversations, strict=True):
            print(f"{colour}:", *answers, sep="\n  ")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
    except ApiaryError as error:
        sys.exit(f"{error.reason or error.code.name}: {error}")
