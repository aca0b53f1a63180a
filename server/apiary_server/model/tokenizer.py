"""Text and chat messages to token ids and back. Thread-safe."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from apiary_server.errors import InvalidField
from apiary_server.model.types import Message, Messages, Text

_MARK = "\ue000reply\ue000"  # private use: in no template
_EXCHANGE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]


class Tokenizer:
    """The model's tokenizer and chat template.

    A session's later messages are rendered alone, as what the template puts behind a finished exchange. So a
    turn costs what it appends, and the transcript holds the very tokens that the model generated, not what a
    second rendering would make of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.backend: Backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may ask for it, and a prompt would lose its end
        self.backend.no_padding()
        self.vocab_size = vocab_size
        self.chat = tokenizer.chat_template is not None

    @property
    def digest(self) -> str:
        """Tells tokenizers apart: the same one makes and reads the same transcripts."""
        parts = (self.backend.to_str(), repr(self._tokenizer.chat_template))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, input: Text | Messages, *, first: bool = True, open_reply: bool = False) -> list[int]:
        """Token ids of a turn's input.

        Args:
            input: text, or messages (the answer's opening is added).
            first: whether it opens the session.
            open_reply: whether the turn before was a chat turn, whose reply must be closed first.

        Raises:
            InvalidField: messages for a model without a chat template, or that its template refuses, or
                a token that the tokenizer has and the model has not.
        """
        if isinstance(input, Text):
            return self._ids(input.text, "text", special=first)
        if not self.chat:
            raise InvalidField([("messages", "this model has no chat template; send text or token_ids")])
        text = self._rendered(input.messages, first=first, open_reply=open_reply)
        return self._ids(text, "messages", special=False)

    def opening(self, messages: Sequence[Message], ids: Sequence[int]) -> int:
        """How many tokens of a session's first messages come before its user's words: the system prompt, and
        what the template puts around it.

        Args:
            messages: they.
            ids: their tokens.
        """
        system = list(itertools.takewhile(lambda message: message.role == "system", messages))
        role = messages[len(system)].role if len(system) < len(messages) else "user"
        mark = Message(role=role, content=_MARK)
        opening, found, _ = self._rendered([*system, mark], first=True, open_reply=False).partition(_MARK)
        if not found:
            return 0
        alone = self._ids(opening, "messages", special=False)
        # where a token reaches into the user's words, that is no longer the prompt's
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False))
        return len(list(pairs))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Raises:
            InvalidField: an id is not in the vocabulary.
        """
        self.check(ids, "token_ids")
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, tokens: Sequence[int], places: Sequence[int]) -> list[str]:
        """The text of each of the tokens at some places of a transcript, special tokens' too. What is no
        whole character by itself is U+FFFD."""
        alone = [[tokens[place]] for place in places]
        before = [list(tokens[max(place - 1, 0) : place]) for place in places]
        both = [[*one, *other] for one, other in zip(before, alone, strict=True)]
        texts = (self.backend.decode_batch(each, skip_special_tokens=False) for each in (alone, before, both))
        # some decoders take the space before a first word away, so it is seen behind its neighbour
        return [
            whole[len(left) :] if len(whole) > len(left) and whole.startswith(left) else piece
            for piece, left, whole in zip(*texts, strict=True)
        ]

    def check(self, ids: Sequence[int], field: str, *, first: int = 0) -> None:
        """Refuse ids that are not in the vocabulary; `first` is the index of the first in the field.

        Raises:
            InvalidField: with the place of the first such id.
        """
        for place, id in enumerate(ids, first):
            if not 0 <= id < self.vocab_size:
                why = f"{id} is not in the vocabulary of {self.vocab_size} tokens"
                raise InvalidField([(f"{field}[{place}]", why)])

    def _ids(self, text: str, field: str, *, special: bool) -> list[int]:
        # `encode` holds the interpreter's lock for as long as it takes, and with it all other streams
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        if ids and max(ids) >= self.vocab_size:  # added to the tokenizer, but the model was not resized
            unknown = self.backend.id_to_token(max(ids))
            raise InvalidField([(field, f"it holds {unknown!r}, for which this model has no embedding")])
        return ids

    def _rendered(self, messages: Sequence[Message], *, first: bool, open_reply: bool) -> str:
        new = [{"role": message.role, "content": message.content} for message in messages]
        try:
            if first:
                return self._render(new, reply=True)
            text = self._render([*_EXCHANGE, *new], reply=True).partition(_MARK)[2]
            closing = "" if open_reply else self._render(_EXCHANGE, reply=False).partition(_MARK)[2]
        except Exception as error:  # a template may raise anything
            raise InvalidField([("messages", f"the model's chat template refuses them: {error}")]) from error
        if not text:
            why = "the model's chat template leaves them out behind a finished exchange"
            raise InvalidField([("messages", why)])
        return text.removeprefix(closing)

    def _render(self, messages: list[dict[str, str]], *, reply: bool) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        return str(text)
