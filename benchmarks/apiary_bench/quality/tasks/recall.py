"""Facts of a conversation's first turn, asked for in later turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from apiary_bench.errors import DataError
from apiary_bench.quality import data as files
from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.ensemble import Ensemble
from apiary_bench.quality.generation import greedy, surprise
from apiary_bench.quality.memory import Segment, Trace
from apiary_bench.quality.tasks.task import Metric, Outcome, Task
from apiary_server.model.types import Message, Messages, Text

_NAMES = """
    Amara Bennet Clara Dmitri Elena Farid Greta Hassan Ingrid Jonas Keiko Lorenzo Mirela Nadia Oskar Priya
    Quentin Rosa Stefan Tamsin Ulrich Vera Winston Yusuf
"""
_VALUES = {
    "favourite colour": "red blue green yellow purple orange silver black",
    "pet": "dog cat parrot rabbit horse turtle snake goldfish",
    "home city": "Paris Tokyo Cairo Lima Oslo Boston Madrid Sydney",
    "job": "baker pilot lawyer nurse farmer painter plumber judge",
    "instrument": "piano violin guitar flute drums trumpet harp cello",
    "favourite fruit": "apple banana mango cherry lemon peach grape melon",
    "sport": "tennis golf boxing rowing hockey chess fencing surfing",
    "birth month": "January March April June July August October December",
    "favourite drink": "tea coffee milk wine beer water cocoa cider",
}
_READ = "I have read it and I will remember the facts."


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn appends, and the fact that it asks for.

    Attributes:
        tokens: the reply that history has for the turn before, and the user's message.
        lead: the reply to this question, up to the answer.
        value: the answer.
        value_ids: its tokens.
    """

    tokens: list[int] = field(repr=False)
    lead: list[int] = field(repr=False)
    value: str
    value_ids: list[int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The first turn, with all the facts and a long text, and the turns that ask."""

    opening: list[int] = field(repr=False)
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Recall(Task[Conversation]):
    """Nine facts in turn 1, at a random place of a text, and one question in each of turns 2 to 10, each
    behind another piece of text.

    Every turn's input is one segment, behind which a policy compacts where it is due. All policies see the
    same conversation: history has the right answers. `match` is the share of questions whose greedy answer
    has the value as a word of its own; `answer_nll`, the mean negative log-likelihood in nats per token of
    the value behind "NAME's ATTRIBUTE is"; `compacted`, the share of questions that came when the policy had
    dropped entries already: where it is below 1, the others were asked of a whole history. Answers are
    looked at, and no part of the conversation. Memory is averaged over the questions: what the cache holds
    when it answers.

    Attributes:
        output: the most tokens of an answer.
        first_words, later_words: of the text in the first turn, and in each other. The first turn is long
            enough for 564 entries' worth of any unquantised policy to compact behind it.
    """

    output: int = 16
    first_words: int = 720
    later_words: int = 40

    name = "recall"
    metrics = (
        Metric("match", "higher"),
        Metric("answer_nll", "lower"),
        Metric("compacted", "higher", digits=2),
    )
    limit = 20
    files = ("wikitext2.txt",)
    budget = frozenset({"entries"})

    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[Conversation]:
        words = _words(files.text(data, self.files[0]))
        if len(words) < 2 * self.first_words:
            raise DataError(f"{data / self.files[0]} has {len(words)} words, too few to fill conversations")
        found = [self._conversation(words, bench, seed, number) for number in range(limit)]
        longest = max(len(each.opening) + sum(len(turn.tokens) for turn in each.turns) for each in found)
        bench.require_positions("a conversation of the recall task", longest + self.output)
        return found

    def _conversation(self, words: list[str], bench: Bench, seed: int, number: int) -> Conversation:
        random = np.random.default_rng([seed, number])

        def filler(count: int) -> str:
            start = int(random.integers(len(words) - count))
            return " ".join(words[start : start + count])

        def encode(text: str, *, first: bool) -> list[int]:
            messages = Messages(messages=(Message(role="user", content=text),))
            return bench.loaded.tokenizer.encode(messages, first=first, open_reply=not first)

        def ids(text: str) -> list[int]:
            return bench.loaded.tokenizer.encode(Text(text=text), first=False)

        names = [str(name) for name in random.permutation(_NAMES.split())]
        facts = [
            (f"{name}'s {what}", str(random.choice(_VALUES[what].split())))
            for name, what in zip(names, random.permutation(list(_VALUES)), strict=False)
        ]
        listed = "\n".join(f"{what} is {value}." for what, value in facts)
        # not always first: a rule that keeps whatever came first would win
        before = int(random.integers(1, self.first_words))
        opening = (
            "Read this text, and remember the facts about people that stand in it. I will ask for them later."
            f"\n\n{filler(before)}\n\n{listed}\n\n{filler(self.first_words - before)}"
        )
        turns, reply = [], ids(_READ)
        for place in random.permutation(len(facts)):
            what, value = facts[place]
            asked = (
                f"Read this text too:\n\n{filler(self.later_words)}\n\n"
                f"Now a question about the facts that I gave you: what is {what}?"
            )
            lead, answer = ids(f"{what} is"), ids(f" {value}")
            turns.append(Turn([*reply, *encode(asked, first=False)], lead, value, answer))
            reply = [*lead, *answer, *ids(".")]
        return Conversation(encode(opening, first=True), tuple(turns))

    def prompt(self, document: Conversation) -> Sequence[int]:
        return document.opening

    def segments(self, document: Conversation) -> Sequence[Sequence[int]]:
        return [document.opening, *(turn.tokens for turn in document.turns)]

    def target(self, document: Conversation, budget: Budget) -> float:
        return budget.entries

    def run(
        self, documents: Sequence[Conversation], targets: Sequence[float], bench: Bench
    ) -> list[list[Outcome]]:
        return [self._run(*each, bench) for each in zip(documents, targets, strict=True)]

    def _run(self, document: Conversation, target: float, bench: Bench) -> list[Outcome]:
        loaded = bench.loaded
        trace: Trace = (
            Segment(len(document.opening), 0),
            *(Segment(len(turn.tokens), 1) for turn in document.turns),
        )
        sized = bench.sized(trace, target)
        policies = [each.policy for each in sized]
        appended = max(len(turn.tokens) for turn in document.turns)
        ahead = max(self.output, *(len(turn.lead) + len(turn.value_ids) for turn in document.turns))
        ensemble = Ensemble(loaded, policies, sum(segment.tokens for segment in trace) + ahead)
        ensemble.resize(policies, max(appended, ahead))
        ensemble.read(document.opening)
        ensemble.end(leave=True)
        hits, nll, compacted = ([0.0] * len(policies) for _ in range(3))
        for turn in document.turns:
            for i, cache in enumerate(ensemble.caches):
                compacted[i] += cache.n < cache.seen
            following = ensemble.read(turn.tokens, at=[len(turn.tokens) - 1])
            ensemble.end()
            for i, (behind,) in enumerate(ensemble.look([turn.lead + turn.value_ids[:-1]])):
                nll[i] += surprise(behind[-len(turn.value_ids) :], turn.value_ids)
            first = {i: int(logits[0].argmax()) for i, logits in enumerate(following)}
            (answers,) = greedy([ensemble], [first], self.output, look=True)
            for i, answer in answers.items():
                hits[i] += says(loaded.tokenizer.decode(answer), turn.value)
        count = len(document.turns)
        totals = {"match": hits, "answer_nll": nll, "compacted": compacted}
        return [
            Outcome.of(each, each.footprint, {name: total[i] / count for name, total in totals.items()})
            for i, each in enumerate(sized)
        ]


def says(output: str, value: str) -> bool:
    """Whether the words of a value are words of the output, one behind the other, whatever their case."""
    said, wanted = (re.findall(r"\w+", text.lower()) for text in (output, value))
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said)))


def _words(text: str) -> list[str]:
    """Running text without headings and the marks of the tokenised form."""
    lines = [line for line in text.splitlines() if not line.strip().startswith("=")]
    plain = re.sub(r" ?@(.)@ ?", r"\1", " ".join(lines)).replace("<unk>", "")
    return re.sub(r" ([.,;:!?])", r"\1", plain).split()
