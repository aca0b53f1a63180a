"""The table."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from apiary_bench.peers import report
from apiary_bench.peers.results import Results
from apiary_bench.peers.workload import Load

from .fakes import run, workload

ARGUMENTS: dict[str, Any] = {"peers": ["apiary-fp32", "vllm", "llama.cpp"], "repeats": 1}
WORKLOADS = [workload(Load(sessions=2, input=8, output=8))]


def cells(results: Results) -> list[dict[str, str]]:
    """The Markdown table's rows by column."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.markdown(results, WORKLOADS).splitlines()
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_row_states_what_ran_and_what_came_of_it() -> None:
    results = Results(ARGUMENTS, [run("apiary-fp32", 123.4), run("vllm", 10.0, memory_bytes=2**30)])
    ours, theirs = cells(results)
    assert ours["workload"] == "small, no. 1, answering"
    assert ours["engine"] == "apiary-fp32 1.2"
    assert ours["weights / cache"] == "float32 / f16"
    assert ours["budget"] == "1 GiB"
    assert (ours["tokens/s"], theirs["tokens/s"]) == ("123", "10")
    assert (ours["step ms"], ours["TTFT mean s"], ours["turn max s"]) == ("100", "0.2", "2")
    assert (ours["memory MiB"], theirs["memory MiB"]) == ("1", "1,024")


def test_ratios_are_to_each_peer_at_the_same_point() -> None:
    runs = [run("apiary-fp32", 30.0), run("vllm", 10.0), run("llama.cpp", 20.0)]
    ours, vllm, llama = cells(Results(ARGUMENTS, runs))
    assert (ours["x vllm"], ours["x llama.cpp"]) == ("3.00", "1.50")
    assert (vllm["x vllm"], vllm["x llama.cpp"]) == ("", "0.50")
    assert llama["x vllm"] == "2.00"
    assert "x apiary-fp32" not in ours


def test_a_void_row_has_its_reason_and_no_numbers() -> None:
    ours, theirs = cells(Results(ARGUMENTS, [run("apiary-fp32", 30.0), run("vllm", None)]))
    assert theirs["void, because"] == "it broke"
    assert theirs["tokens/s"] == theirs["turn max s"] == ""
    assert theirs["weights / cache"] == "float32 / f16"
    assert ours["void, because"] == ""
    assert "x vllm" not in ours


def test_the_terminals_table_has_the_same_cells() -> None:
    results = Results(ARGUMENTS, [run("apiary-fp32", 30.0), run("vllm", None)])
    console = Console(width=400, record=True, file=None, quiet=True)
    console.print(report.table(results, WORKLOADS))
    console = Console(width=400)
    with console.capture() as capture:
        console.print(report.table(results, WORKLOADS))
    shown = capture.get()
    for row in cells(results):
        for name, cell in row.items():
            assert name in shown
            assert cell in shown


def test_notes_tell_how_each_engine_was_set_up() -> None:
    results = Results(ARGUMENTS, [run("vllm", 1.0), run("vllm", 2.0, repeat=1), run("llama.cpp", 1.0)])
    assert report.notes(results) == ["vllm 1.2: two threads", "llama.cpp 1.2: two threads"]
