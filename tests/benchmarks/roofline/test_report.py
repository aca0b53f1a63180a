"""Steps and floors as tables and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from apiary_bench.roofline import report
from apiary_bench.roofline.part import Part
from tests.benchmarks.engine.small import POLICY, workbench
from tests.benchmarks.engine.test_report import lines
from tests.benchmarks.roofline.samples import PLAN, RESULT


def test_the_heading_has_the_ceilings(model_path: Path) -> None:
    first, subject, ceilings = report.heading(workbench(model_path), PLAN, RESULT).splitlines()
    assert first == "roofline: 64 steps after 600 of history; the compaction period is 32"
    assert subject.endswith(f"{POLICY}; weights fp32, cache float32, 1 threads")
    assert ceilings == "copy 20.0 GB/s (read alone 24.0), products 250 Gflop/s"
    integers = replace(RESULT, ceilings=replace(RESULT.ceilings, int8=700e9))
    assert report.heading(workbench(model_path), PLAN, integers).endswith("of int8 700 Gop/s")


def test_steps_are_multiples_of_their_floors() -> None:
    shown = lines(report.steps(RESULT))
    assert "1 550 16.00 32.00 2.00 36.00 2.25 50.00" in shown
    assert "16 550 16.00 32.00 2.00 36.00 2.25 50.00" in shown


def test_parts_add_up() -> None:
    shown = lines(report.parts(RESULT))
    assert "linear 0.00 10.00 0.00 10.00" in shown
    assert "attention 1.00 6.00 1.00 6.00" in shown
    assert "delivery 7.00 7.00" in shown
    assert "step 36.00 16.00 36.00 16.00" in shown
    assert all(any(line.startswith(part) for line in shown) for part in Part)


def test_what_programs_read(model_path: Path) -> None:
    content = report.document(workbench(model_path), PLAN, RESULT)
    content = json.loads(json.dumps(content, allow_nan=False))
    assert content["arguments"] == {"sessions": [1, 16], "history": 600, "steps": 64}
    assert content["ceilings"]["copy"] == 20e9
    assert content["environment"]["policy"] == POLICY
    assert content["period"] == 32
    one, _ = content["rows"]
    assert one["floor"] == {"linear": 0.01, "attention": 0.006}
    assert one["parts"]["delivery"] == 0.007
    assert one["times_floor"] == {"median": 2.0, "mean": 2.25}
    assert len(one["steps"]) == 64
