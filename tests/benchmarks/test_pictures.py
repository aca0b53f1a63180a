"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from apiary_bench.errors import BenchError
from apiary_bench.pictures import require, save


def test_pictures_are_saved_under_their_names(tmp_path: Path) -> None:
    made = save(tmp_path / "new", {"a.png": Figure(), "b.png": Figure()})
    assert made == [tmp_path / "new" / "a.png", tmp_path / "new" / "b.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_where_they_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="pictures cannot be written to"):
        require(tmp_path / "file" / "pictures")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(BenchError, match="pictures cannot be written to"):
        save(tmp_path, {"a.png": Figure()})
