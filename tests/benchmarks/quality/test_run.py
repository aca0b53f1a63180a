"""Runs over small documents: outcomes, resuming, tables, JSON and pictures."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from apiary_bench.quality import plots, report
from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.journal import Journal
from apiary_bench.quality.memory import Segment, counts
from apiary_bench.quality.run import Results, Stage, code, prepare, run
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks.fidelity import Fidelity, divergence
from apiary_bench.quality.tasks.qa10 import QA10, matches
from apiary_bench.quality.tasks.recall import Recall, says
from apiary_bench.quality.tasks.summary import CNN_DM, XSUM
from apiary_bench.quality.tasks.task import Outcome, Task
from apiary_bench.quality.tasks.wikitext import WikiText
from buzz import parse
from tests import tiny

SPECS = (
    "h2o(heavy=40,recent=40,block=4)",
    "streaming(sink=4,window=80,block=4)",
    "buzz(sink=2,window=20,threshold=60)",
)
SMALL: dict[str, Task[Any]] = {
    "wikitext": WikiText(length=300, warmup=120, chunk=16),
    "xsum": XSUM,
    "cnn_dm": CNN_DM,
    "qa10": QA10(output=8),
    "fidelity": Fidelity(output=8, sources=(QA10(), XSUM)),
    "recall": Recall(output=3, first_words=20, later_words=3),
}
BUDGET = Budget(90, 2.5)


def stage(name: str, bench: Bench, data: Path, limit: int = 2) -> Stage:
    task = SMALL[name]
    return Stage(task, BUDGET, task.documents(data, bench, limit, 0), f"{name}-key")


def silent(stage: str, done: int, total: int) -> None: ...


@pytest.fixture
def ours(bench: Callable[..., Bench]) -> Bench:
    return bench(*SPECS)


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


def test_perplexity_of_the_full_cache_is_the_models_own(ours: Bench, data: Path) -> None:
    task = WikiText(length=300, warmup=120, chunk=16)
    (document,) = task.documents(data, ours, 1, 0)
    with torch.inference_mode():
        outcome = task.run([document], [90], ours)[0][0]
        model = ours.loaded.model
        model.set_attn_implementation("eager")
        logits = model(torch.tensor([document]), use_cache=False).logits[0]
        model.set_attn_implementation("apiary")
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
    around = {"journal.py", "plots.py", "report.py", "settings.py", "statistics.py"}
    left_out = {path.name for path in loaded - {path.resolve() for path in code()}}
    assert {"policy.py", "blockwise.py", "data.py", "tokenizer.py", "loader.py"} <= {p.name for p in loaded}
    assert left_out == around


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


def test_the_report(ours: Bench, data: Path, tmp_path: Path) -> None:
    settings = Settings(data=data, tasks=("qa10",), policies=SPECS, entries=(90,))
    results = run(ours, [stage("qa10", ours, data)], Journal(None), silent)
    found = report.sections(settings, ours, results)
    content = report.document(settings, found)
    report.write(tmp_path / "a.json", content)
    (task,) = json.loads((tmp_path / "a.json").read_text())["tasks"]
    assert (task["task"], task["budget"], task["documents"]) == ("qa10", {"entries": 90}, 2)
    assert [policy["label"] for policy in task["policies"]] == ["full", *SPECS]
    h2o = task["policies"][1]
    nll = [outcome["scores"]["answer_nll"] for outcome in h2o["outcomes"]]
    full = [outcome["scores"]["answer_nll"] for outcome in task["policies"][0]["outcomes"]]
    assert h2o["scores"]["answer_nll"]["value"] == pytest.approx(sum(nll) / 2)
    assert h2o["baseline"]["answer_nll"]["value"] == pytest.approx((sum(nll) - sum(full)) / 2)
    assert task["rivals"]["answer_nll"] in SPECS[:2]

    console = Console(width=250)
    with console.capture() as captured:
        console.print(report.table(settings, found[0]))
    shown = captured.get()
    assert "qa10 (90 entries), 2 documents" in shown
    assert "match less full" in shown
    for spec in SPECS:
        assert spec in shown


def test_a_policy_that_misses_the_target_is_marked(ours: Bench, data: Path) -> None:
    settings = Settings(data=data, tasks=("qa10",), policies=SPECS, entries=(90,))
    here = stage("qa10", ours, data, limit=1)
    outcomes = [Outcome("p", 9, 100, 103.0, 200, 100.0, {"match": 1.0, "answer_nll": 1.0}) for _ in range(4)]
    (section,) = report.sections(settings, ours, [Results(here, [outcomes])])
    assert section.rows[1].matched is False
    console = Console(width=250)
    with console.capture() as captured:
        console.print(report.table(settings, section))
    assert "not matched: +3.0%" in captured.get()


def test_pictures(ours: Bench, data: Path, tmp_path: Path) -> None:
    settings = Settings(data=data, tasks=("qa10",), policies=SPECS, entries=(90,))
    here = stage("qa10", ours, data, limit=1)
    results = run(ours, [here], Journal(None), silent)
    found = report.sections(settings, ours, results)
    made = plots.draw(tmp_path / "new", ours, found)
    assert [path.name for path in made] == ["qa10.png", "kept.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    shares = plots.kept_shares(ours, results[0])
    assert list(shares) == list(SPECS)
    tokens = len(here.task.prompt(here.documents[0]))
    for share, outcome in zip(shares.values(), results[0].outcomes[0][1:], strict=True):
        assert share.shape == (2, min(512, tokens))
        ((_, kept),) = counts(parse(outcome.policy), (Segment(tokens, 1),))
        assert share.mean() * tokens == pytest.approx(kept, rel=0.05)
        assert share[:, -1].min() == 1  # the most recent tokens


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
