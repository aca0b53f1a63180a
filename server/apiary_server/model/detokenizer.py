"""Tokens to text, one at a time: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass(slots=True)
class Released:
    """What may be shown now: text, and the tokens whose text is all out."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)


class Detokenizer:
    """Incremental text of one answer.

    Text that may be the beginning of a stop string is held back until it is clear, with its tokens.

    Args:
        tokenizer: the model's.
        stop: the answer ends before any of these strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._text = ""  # not yet released
        self._tokens: deque[tuple[int, int]] = deque()  # (token, where its text ends), not yet released
        self._undecoded = 0  # of these, tokens at the end whose character is not complete
        self._released_to = 0  # where the released text ends
        self.stopped = False

    @property
    def held(self) -> int:
        """Tokens that were added and not released."""
        return len(self._tokens)

    def add(self, token: int) -> Released:
        """Take the next token; sets `stopped` when it completes a stop string."""
        piece = self._decoder.step(self._tokenizer, token)
        self._tokens.append((token, -1))
        self._undecoded += 1
        if piece is None:
            return Released()
        self._text += piece
        end = self._released_to + len(self._text)
        for back in range(1, self._undecoded + 1):
            self._tokens[-back] = (self._tokens[-back][0], end)
        self._undecoded = 0
        cut = min((at for at in map(self._text.find, self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return self._release(cut)
        return self._release(len(self._text) - self._possible_stop())

    def finish(self) -> Released:
        """The answer ended without a stop string: release the rest (but half a character)."""
        released = self._release(len(self._text))
        released.token_ids += [token for token, _ in self._tokens]
        self._tokens.clear()
        return released

    def _release(self, length: int) -> Released:
        released = Released(self._text[:length])
        self._text = self._text[length:]
        self._released_to += length
        while self._tokens and 0 <= self._tokens[0][1] <= self._released_to:
            released.token_ids.append(self._tokens.popleft()[0])
        return released

    def _possible_stop(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
