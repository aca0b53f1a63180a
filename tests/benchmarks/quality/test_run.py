"""Runs over small documents: outcomes and resuming."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from apiary_bench.quality.bench import Bench
from apiary_bench.quality.journal import Journal
from apiary_bench.quality.run import code, prepare, run
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks.fidelity import divergence
from apiary_bench.quality.tasks.qa10 import matches
from apiary_bench.quality.tasks.recall import Recall, says
from apiary_bench.quality.tasks.wikitext import WikiText
from tests import tiny
from tests.benchmarks.quality.small import BUDGET, SMALL, silent, stage


@pytest.mark.parametrize("name", SMALL)
def test_every_policy_has_equal_memory_and_all_scores(name: str, ours: Bench, data: Path) -> None:
    (results,) = run(ours, [stage(name, ours, data)], Journal(None), silent)
    assert len(results.outcomes) == 2
    for document, outcomes in zip(results.stage.documents, results.outcomes, strict=True):
        assert [outcome.policy.partition("(")[0] for outcome in outcomes] == [
            "full",
            "h2o",
            "streaming",
            "buzz",
        ]
        prompt = len(results.stage.task.prompt(document))
        assert outcomes[0].target_bytes is None
        assert outcomes[0].entries > 1.5 * outcomes[1].entries
        for outcome in outcomes:
            assert set(outcome.scores) == {metric.name for metric in results.stage.task.metrics}
            assert outcome.peak_bytes >= outcome.bytes
            assert outcome.entries < prompt + 2000
        for outcome in outcomes[1:3]:
            assert outcome.target_bytes is not None
            assert outcome.bytes == pytest.approx(outcome.target_bytes, rel=0.06)


def test_fidelity_of_the_full_cache_to_itself(bench: Callable[..., Bench], data: Path) -> None:
    roomy = bench("streaming(window=2000,block=1)", "h2o(heavy=40,recent=40)")
    unscaled = Bench(roomy.loaded, roomy.contenders, match=None)
    (results,) = run(unscaled, [stage("fidelity", unscaled, data)], Journal(None), silent)
    for full, same, less in results.outcomes:
        assert full.scores == {"kl": 0.0, "agreement": 1.0}
        # it evicts nothing, and is computed on its own
        assert same.scores == {"kl": pytest.approx(0, abs=1e-6), "agreement": 1.0}
        assert less.scores["kl"] > 1e-3


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    found = divergence(p.log() + 3, torch.stack([q.log() - 1, p.log()]))
    expected = float((p * (p / q).log()).sum())
    assert found.tolist() == pytest.approx([expected, 0], abs=1e-6)


def test_perplexity_of_the_full_cache_is_the_models_own(ours: Bench, data: Path, model_path: Path) -> None:
    task = WikiText(length=300, warmup=120, chunk=16)
    (document,) = task.documents(data, ours, 1, 0)
    with torch.inference_mode():
        outcome = task.run([document], [90], ours)[0][0]
        model = AutoModelForCausalLM.from_pretrained(model_path)
        logits = model(torch.tensor([document]), use_cache=False).logits[0]
    own = torch.nn.functional.cross_entropy(logits[119:299], torch.tensor(document[120:]))
    assert outcome.scores["perplexity"] == pytest.approx(float(own), rel=1e-4)


def test_answers_are_compared_in_plain_form() -> None:
    assert matches("It was The  Grand-Hotel, of course.", ["grandhotel"])
    assert matches("An answer: Paris!", ["the Paris"])
    assert not matches("Lyon", ["Paris", "The"])


def test_a_conversation_states_facts_and_asks_for_each(bench: Callable[..., Bench], data: Path) -> None:
    tokenizer = bench().loaded.tokenizer
    words = (data / "wikitext2.txt").read_text().split()
    first, again, other = (Recall()._conversation(words, bench(), seed, 0) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    opening = tokenizer.decode(first.opening)
    assert len(first.turns) == 9
    for turn in first.turns:
        lead = tokenizer.decode(turn.lead)
        assert f"{lead} {turn.value}." in opening
        assert f"what is {lead.removesuffix(' is')}?" in tokenizer.decode(turn.tokens)
        assert tokenizer.decode(turn.value_ids) == f" {turn.value}"
    told = tokenizer.decode(first.turns[3].tokens)
    assert told.startswith(tokenizer.decode([*first.turns[2].lead, *first.turns[2].value_ids]))


def test_a_fact_is_recalled_by_whole_words() -> None:
    assert says("Amara's favourite colour is Red.", "red")
    assert says("Is it New-York?", "New York")
    assert says("Lima's", "Lima")
    for output in ("I remembered it.", "york, new", "new and york", ""):
        assert not says(output, "red")
        assert not says(output, "New York")


def test_questions_before_any_compaction_are_told_apart(bench: Callable[..., Bench], data: Path) -> None:
    task = Recall(output=2, first_words=20, later_words=3)
    some = bench("streaming(sink=4,window=200)", "streaming(sink=4,window=4000)")
    (document,) = task.documents(data, some, 1, 0)
    # one policy that never gets full, one that does with the first turn, one that does with the third
    late = len(document.opening) + sum(len(turn.tokens) for turn in document.turns[:2]) - 1
    unscaled = Bench(
        some.loaded, (*some.contenders, *bench(f"window(window={late},block=1)").contenders[1:]), match=None
    )
    with torch.inference_mode():
        (outcomes,) = task.run([document], [90], unscaled)
    assert [outcome.scores["compacted"] for outcome in outcomes] == pytest.approx([0, 1, 0, 7 / 9])


class Stopped(BaseException):
    """As a Ctrl-C comes."""


def test_a_stopped_run_goes_on_and_ends_alike(ours: Bench, data: Path, tmp_path: Path) -> None:
    stages = [stage("wikitext", ours, data), stage("qa10", ours, data)]
    whole = run(ours, stages, Journal(None), silent)
    calls = []

    def stop(name: str, done: int, total: int) -> None:
        calls.append((name, done, total))
        if len(calls) == 2:
            raise Stopped

    path = tmp_path / "a.partial"
    with pytest.raises(Stopped), Journal(path) as journal:
        run(ours, stages, journal, stop)
    assert len(path.read_text().splitlines()) == 1
    with Journal(path) as journal:
        assert run(ours, stages, journal, silent) == whole
    assert len(path.read_text().splitlines()) == 4
    assert calls == [("wikitext (90 entries)", i, 2) for i in range(2)]


def test_a_key_covers_all_loaded_code_that_makes_outcomes() -> None:
    packages = ("buzz.", "apiary_bench.quality.", "apiary_server.model.")
    loaded = {
        Path(str(module.__file__)).resolve()
        for name, module in sys.modules.items()
        if name.startswith(packages)
    }
    around = {"journal.py", "plots.py", "record.py", "report.py", "sample.py", "settings.py"}
    around |= {"statistics.py", "tables.py"}
    left_out = {path.name for path in loaded - {path.resolve() for path in code()}}
    assert {"policy.py", "blockwise.py", "data.py", "tokenizer.py", "loader.py"} <= {p.name for p in loaded}
    assert {"journal.py", "settings.py", "statistics.py"} <= left_out <= around


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("keyed"), tiny.config(max_position_embeddings=4096))


@pytest.mark.parametrize("changed", ["model.safetensors", "chat_template.jinja", "qa10.jsonl", None])
def test_a_key_covers_model_and_data(changed: str | None, model: Path, data: Path, tmp_path: Path) -> None:
    weights, files = tmp_path / "model", tmp_path / "data"
    shutil.copytree(model, weights)
    shutil.copytree(data, files)

    def key() -> str:
        settings = Settings(data=files, model=str(weights), tasks=("qa10",), policies=("h2o",), limit=1)
        _, (here,) = prepare(settings)
        return here.key

    before = key()
    if changed is not None:
        (path,) = tmp_path.glob(f"*/{changed}")
        content = path.read_bytes()
        other = content.replace(b"Be brief", b"Be short").replace(b"stone", b"stove")
        # as large as it was; the weights' last byte is one of a number
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if other == content else other)
    assert (key() == before) is (changed is None)


@pytest.mark.parametrize("name", ["xsum", "qa10", "fidelity"])
def test_documents_that_are_run_together_do_not_mix(name: str, ours: Bench, data: Path) -> None:
    here = stage(name, ours, data)
    targets = [here.task.target(document, BUDGET) for document in here.documents]
    with torch.inference_mode():
        together = here.task.run(here.documents, targets, ours)
        alone = [
            here.task.run([each], [target], ours)[0]
            for each, target in zip(here.documents, targets, strict=True)
        ]
    assert together[0] != together[1]
    for mine, others in zip(together, alone, strict=True):
        for outcome, other in zip(mine, others, strict=True):
            assert outcome.scores == pytest.approx(other.scores, abs=1e-4)
            assert (outcome.policy, outcome.bytes) == (other.policy, other.bytes)
