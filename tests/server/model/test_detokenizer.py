"""Text of one answer, token by token: whole characters, and nothing of a stop string."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from apiary_server.model.detokenizer import Detokenizer, Released
from tests import tiny

BYTES = tiny.tokenizer().backend_tokenizer
IDS = {byte: BYTES.token_to_id(char) for byte, char in bytes_to_unicode().items()}
END, START = BYTES.token_to_id("<|endoftext|>"), BYTES.token_to_id("<|im_start|>")
UNKNOWN = 258 + 50  # a model may have more embeddings than its tokenizer has tokens


def split(text: str | bytes) -> list[int]:
    """One token per byte."""
    return [IDS[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def with_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several, the one that begins first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


def stream(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[Released]:
    """What each token releases, then what the end does; ends at a stop string."""
    pieces = []
    for added, token in enumerate(tokens, 1):
        pieces.append(detokenizer.add(token))
        assert added == sum(len(piece.token_ids) for piece in pieces) + detokenizer.held
        if detokenizer.stopped:
            return pieces
    pieces.append(detokenizer.finish())
    assert detokenizer.held == 0
    return pieces


def text(pieces: Sequence[Released]) -> str:
    return "".join(piece.text for piece in pieces)


def ids(pieces: Sequence[Released]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


# Few letters and stop strings of them, so that stops overlap, repeat and begin in one another.
letters = st.text(alphabet="abé語🐝\n", max_size=24)
stops = st.lists(st.text(alphabet="abé語🐝\n", min_size=1, max_size=4), max_size=4)
# No lone surrogates, which no text has, and no U+FFFD, which is what broken bytes look like.
unicode_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(letters, stops)
@example("abcd", ["abcd", "bc"])
@example("ab", ["abb", "b"])
@example("ababac", ["abac"])
@example("語🐝", ["🐝"])
def test_text_up_to_the_first_stop_however_it_is_cut(answer: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(BYTES, stops)
    pieces = stream(detokenizer, split(answer))
    assert text(pieces) == with_stops(answer, stops)
    assert detokenizer.stopped == any(stop in answer for stop in stops)
    # nothing that was released had to be taken back, and the released tokens are their text
    assert BYTES.decode(ids(pieces)) == text(pieces)


@settings(max_examples=200, deadline=None)
@given(unicode_text, st.lists(unicode_text.filter(bool), max_size=3))
def test_any_text_with_specials_in_between(answer: str, stops: list[str]) -> None:
    tokens = split(answer)
    for token in (START, END, UNKNOWN):
        tokens.insert(len(tokens) * token % (len(tokens) + 1), token)
    pieces = stream(Detokenizer(BYTES, stops), tokens)
    assert text(pieces) == with_stops(answer, stops)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_broken_bytes_show_as_they_decode_but_for_half_a_character_at_the_end(answer: bytes) -> None:
    pieces = stream(Detokenizer(BYTES), split(answer))
    whole = BYTES.decode(split(answer))
    assert ids(pieces) == split(answer)
    assert text(pieces).rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.mark.parametrize("char", ["é", "語", "🐝", "e\u0301", "👩‍👩‍👧‍👦", "🏳️‍🌈"])
def test_no_half_characters(char: str) -> None:
    pieces = stream(Detokenizer(BYTES), split(f"x{char}"))
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.text for piece in pieces if piece.text] == list(f"x{char}")
    for piece in pieces:  # tokens come with the text that they complete
        assert bool(piece.text) == bool(piece.token_ids)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_that_ends_in_the_middle_of_a_character(cut: int) -> None:
    tokens = split("ok🐝")[: 2 + cut]
    pieces = stream(Detokenizer(BYTES), tokens)
    assert text(pieces) == "ok"
    assert ids(pieces) == tokens


def test_whole_characters_of_a_token_that_ends_in_half_of_one_come_with_the_rest() -> None:
    backend = Tokenizer(
        models.BPE({"Ġ": 0, "â": 1, "Ģ": 2, "Ŀ": 3, "Ġâ": 4, "ĠâĢ": 5}, [("Ġ", "â"), ("Ġâ", "Ģ")])
    )
    backend.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(backend)
    assert detokenizer.add(5) == Released()
    assert detokenizer.held == 1
    assert detokenizer.add(3) == Released(" \u201d", [5, 3])
    cut = Detokenizer(backend, [" "])
    assert cut.add(5) == Released()
    assert cut.stopped


def test_what_may_begin_a_stop_string_is_held_back_with_its_tokens() -> None:
    detokenizer = Detokenizer(BYTES, ["\n\nUser:", "\n\n\n"])
    assert text([detokenizer.add(token) for token in split("Hi\n\nUse")]) == "Hi"
    assert detokenizer.held == 5
    released = detokenizer.add(split("d")[0])
    assert released.text == "\n\nUsed"
    assert released.token_ids == split("\n\nUsed")
    assert detokenizer.held == 0
    assert text([detokenizer.add(token) for token in split("\n")]) == ""
    assert detokenizer.finish() == Released("\n", split("\n"))


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["STOP"], "ab"),
        (["STOP", "ST"], "ab"),  # one begins another
        (["ST", "STOP"], "ab"),
        (["TO", "STOP"], "abS"),  # the one that is complete first
        (["a"], ""),
        (["abSTOPcd"], ""),
        (["d"], "abSTOPc"),
        (["x", "abSTOPcdx"], "abSTOPcd"),
        ([], "abSTOPcd"),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_stops_at_any_place_in_one_token_or_across_tokens(stops: list[str], shown: str, merged: bool) -> None:
    if merged:
        backend = Tokenizer(models.WordLevel({"abSTOPcd": 0, "": 1}, unk_token=""))
        backend.decoder = decoders.Fuse()
        tokens = [0]
    else:
        backend, tokens = BYTES, split("abSTOPcd")
    pieces = stream(Detokenizer(backend, stops), tokens)
    assert text(pieces) == shown


def test_tokens_of_a_stop_string_are_not_released() -> None:
    detokenizer = Detokenizer(BYTES, ["END"])
    pieces = stream(detokenizer, split("okEND"))
    assert ids(pieces) == split("ok")
    assert detokenizer.held == 3


def test_special_and_unknown_tokens_have_no_text_and_delay_none() -> None:
    detokenizer = Detokenizer(BYTES)
    first = detokenizer.add(split("a")[0])
    assert first == Released("a", split("a"))
    assert detokenizer.add(START) == Released("", [START])
    assert detokenizer.add(UNKNOWN) == Released("", [UNKNOWN])
    pieces = [detokenizer.add(token) for token in (split("é")[0], END, split("é")[1])]
    assert [piece.text for piece in pieces] == ["", "", "é"]
    assert pieces[2].token_ids == [split("é")[0], END, split("é")[1]]


@pytest.mark.parametrize("token", [IDS[0xFF], IDS[0xC3], START])
def test_an_endless_row_without_text_costs_the_same_at_every_token(token: int) -> None:
    detokenizer = Detokenizer(BYTES)
    began = time.perf_counter()
    for _ in range(5000):
        detokenizer.add(token)
        assert detokenizer.held < 20
    assert time.perf_counter() - began < 2.5, "5,000 tokens that are decoded again and again take longer"


def byte_fallback() -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer in the manner of SentencePiece: words with a leading space, and bytes for the rest."""
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, vocabulary


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["▁a", "b", "▁", "é", "🐝"]), max_size=12))
def test_byte_fallback_and_leading_spaces(words: list[str]) -> None:
    backend, vocabulary = byte_fallback()
    tokens: list[int] = []
    for word in words:
        own = word in vocabulary
        tokens += [vocabulary[word]] if own else [vocabulary[f"<0x{byte:02X}>"] for byte in word.encode()]
    pieces = stream(Detokenizer(backend), tokens)
    assert text(pieces) == backend.decode(tokens)
    assert ids(pieces) == tokens


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=30))
def test_byte_fallback_that_takes_a_character_back_is_no_error(tokens: list[int]) -> None:
    """A broken byte behind a whole character makes the tokenizer decode both as broken; shown is shown."""
    pieces = stream(Detokenizer(byte_fallback()[0]), tokens)
    assert ids(pieces) == tokens


def test_a_character_that_was_shown_before_its_run_broke_stays() -> None:
    backend, vocabulary = byte_fallback()
    tokens = [vocabulary[f"<0x{byte:02X}>"] for byte in "é".encode() + b"\xff"]
    assert text(stream(Detokenizer(backend), [*tokens, 2, 1])) == "é\ufffdb a"


@pytest.mark.model
@pytest.mark.timeout(400)
def test_the_real_tokenizer(default_model: Path) -> None:
    backend = Tokenizer.from_file(str(default_model / "tokenizer.json"))

    @settings(max_examples=150, deadline=None)
    @given(
        st.text(alphabet=st.sampled_from("aeé語漢🐝👩‍👧 \n“”the<|im_end|>"), max_size=40),
        st.lists(st.text(alphabet="aeé語🐝 \n“", min_size=1, max_size=3), max_size=3),
    )
    def check(answer: str, stops: list[str]) -> None:
        tokens = backend.encode(answer).ids
        shown = backend.decode(tokens)
        detokenizer = Detokenizer(backend, stops)
        pieces = stream(detokenizer, tokens)
        assert text(pieces) == with_stops(shown, stops)
        assert detokenizer.stopped == any(stop in shown for stop in stops)
        if not detokenizer.stopped:
            assert ids(pieces) == tokens
        assert text(pieces).startswith(backend.decode(ids(pieces)).rstrip("\ufffd"))

    check()
