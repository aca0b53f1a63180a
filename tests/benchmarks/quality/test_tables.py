"""Tables of given scores."""

from __future__ import annotations

from rich.console import Console

from apiary_bench.quality.report import sections
from apiary_bench.quality.sample import Sample
from apiary_bench.quality.tables import markdown, table
from tests.benchmarks.quality.samples import sample

NLL = {"full": [2.0, 3.0], "h2o": [2.2, 3.2], "buzz2": [2.1, 3.1], "buzz2(window=9)": [2.3, 3.3]}
SCORES = {label: [{"perplexity": each} for each in row] for label, row in NLL.items()}
HELD = {"h2o": [1030.0, 1030.0], "buzz2": [1030.0, 970.0]}


def shown(given: Sample) -> list[list[str]]:
    """The cells of the terminal's table, its head first."""
    (section,) = sections([given])
    console = Console(width=400)
    with console.capture() as captured:
        console.print(table(section))
    lines = captured.get().replace("┃", "│").splitlines()
    assert lines[0].startswith("wikitext (90 entries), 2 documents")
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_the_terminals() -> None:
    head, *rows = shown(sample("wikitext", SCORES, held=HELD))
    assert head[:5] == ["policy", "entries", "MB", "peak MB", "slot MB"]
    assert head[5:] == [
        "perplexity",
        "perplexity less full",
        "perplexity less h2o",
        "perplexity less the best other's",
        "perplexity / full's",
    ]
    assert [row[0] for row in rows] == [
        "full",
        "h2o (not matched: +3.00%)",
        "buzz2 (worst document: +3.0%)",
        "buzz2(window=9)",
    ]
    assert [row[4] for row in rows] == ["3.0"] * 4
    assert rows[1][5] == "14.88 [9.03, 24.53]"
    assert [row[6] == "" for row in rows] == [True, False, False, False]
    assert [row[7] == "" for row in rows] == [False, True, False, False]
    assert [row[8].rpartition("] ")[2] for row in rows] == ["", "buzz2", "h2o", "h2o"]
    assert [row[9].partition(" ")[0] for row in rows] == ["", "1.221", "1.105", "1.350"]


def test_what_is_not_known_has_no_column() -> None:
    head, *_ = shown(sample("wikitext", {"full": SCORES["full"]}, slot_bytes={"full": None}))
    assert head == ["policy", "entries", "MB", "peak MB", "perplexity"]


def test_markdown() -> None:
    (section,) = sections([sample("wikitext", SCORES, held=HELD)])
    title, _, head, rule, full, h2o, *_ = markdown(section).splitlines()
    assert title == "### wikitext (90 entries), 2 documents"
    assert head == (
        "| policy | entries | MB | slot MB | perplexity | perplexity less the best other's "
        "| perplexity / full's |"
    )
    assert rule.count("|") == head.count("|") == full.count("|")
    assert h2o.startswith("| h2o (not matched: +3.00%) | 9 | 0.0 | 3.0 | 14.88 [9.03, 24.53] | +1.42 [")
    assert h2o.endswith("] buzz2 | 1.221 [1.221, 1.221] |")
