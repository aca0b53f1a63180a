"""Tokens to text, one at a time: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

_HALF = "\ufffd"  # what bytes decode to that are no character, or not yet
_LONGEST = 16  # tokens without a whole character that may still become one: it has four bytes at most


@dataclass(slots=True)
class Released:
    """What may be shown now: text, and its tokens. The last text before a stop string may be of a token that
    is not shown, since it has some of that, too."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)


class Detokenizer:
    """Incremental text of one answer.

    Text comes with its tokens: what may be the beginning of a stop string, or of a character, is held back
    with the tokens that it is part of until that is clear, so an answer may be cut between any two. Of
    several stop strings the one that is complete first ends the answer; of those that are complete at once
    the one that begins first. So the outcome depends on the text alone, not on how tokens cut it.

    Own code and not `tokenizers.DecodeStream`, which raises where a byte-fallback tokenizer takes back a
    character, and decodes an endless row of broken bytes again at each token.

    Args:
        tokenizer: the model's.
        stop: the answer ends before any of these strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context: list[int] = []  # the last tokens with text: some decoders look back
        self._context_text = ""
        self._fresh: list[int] = []  # tokens after the context
        self._shown = 0  # characters of theirs that are in `_text` already
        self._text = ""  # not yet released
        self._tokens: deque[tuple[int, int]] = deque()  # (token, where its text ends), not yet released
        self._released_to = 0  # where the released text ends
        self.stopped = False
        self.tail = ""  # of the released text, what belongs to a token that was not released

    @property
    def held(self) -> int:
        """Tokens that were added and not released."""
        return len(self._tokens)

    def add(self, token: int) -> Released:
        """Take the next token; sets `stopped` when it completes a stop string."""
        self._tokens.append((token, -1))
        self._text += self._decode(token)
        if not self._fresh:
            end = self._released_to + len(self._text)
            self._tokens = deque((token, end if at < 0 else at) for token, at in self._tokens)
        found = [(at + len(stop), at) for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)[1]
            self.tail = self._text[self._whole(end) : end]
            return self._release(end)
        return self._release(self._whole(len(self._text) - self._possible_stop()))

    def finish(self) -> Released:
        """The answer ended without a stop string: release the rest (but half a character)."""
        released = self._release(len(self._text))
        released.token_ids += [token for token, _ in self._tokens]
        self._tokens.clear()
        return released

    def _decode(self, token: int) -> str:
        """The text that is certain with this token, and was not before."""
        self._fresh.append(token)
        text = self._decoded([*self._context, *self._fresh])
        taken_back = not text.startswith(self._context_text)
        text = self._decoded(self._fresh) if taken_back else text[len(self._context_text) :]
        certain = text.rstrip(_HALF)
        if (certain != text or not (text or self._context)) and len(self._fresh) < _LONGEST:
            piece = certain[self._shown :]
            self._shown = max(self._shown, len(certain))
            return piece
        piece = text[self._shown :]
        if text or not self._context:
            self._context, self._context_text = self._fresh, self._decoded(self._fresh)
        self._fresh, self._shown = [], 0
        return piece

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, length: int) -> Released:
        released = Released(self._text[:length])
        self._text = self._text[length:]
        self._released_to += length
        while self._tokens and 0 <= self._tokens[0][1] <= self._released_to:
            released.token_ids.append(self._tokens.popleft()[0])
        return released

    def _whole(self, length: int) -> int:
        """Where the last token ends whose text is all in the first `length` characters."""
        ends = [end - self._released_to for _, end in self._tokens if end >= 0]
        return max((end for end in ends if end <= length), default=0)

    def _possible_stop(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
