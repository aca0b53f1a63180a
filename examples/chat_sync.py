"""Two turns of one conversation, streamed. Usage: python chat_sync.py [HOST:PORT]"""

import sys

from apiary_client import ApiaryError, Client, Sampling, Stopping


def main(target: str) -> None:
    with Client(target) as client:
        session = client.create_session(ttl=600)  # forgotten ten minutes after its last turn
        try:
            for text in ("My favourite colour is teal.", "What is my favourite colour?"):
                print(f"> {text}")
                for delta in client.stream(
                    text,
                    session=session,
                    sampling=Sampling(temperature=0.0),
                    stopping=Stopping(max_tokens=64),
                    timeout=120,
                ):
                    print(delta.text, end="", flush=True)
                    if delta.usage:
                        print(f"\n[{delta.finish_reason}, {delta.usage.completion_tokens} tokens]")
        finally:
            client.delete_session(session)


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
    except ApiaryError as error:
        sys.exit(f"{error.reason or error.code.name}: {error}")
