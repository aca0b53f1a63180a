"""Compiles the kernels of the CPU backend when the package is built or installed.

A machine without a C compiler gets a package without them, which serves the same, more slowly.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

_KERNELS = Path("server/apiary_server/model/backends/cpu")
_FLAGS = [
    *("-std=c11", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"),
    # sums may be taken in any order, which lets loops be vectorised; NaN and infinity stay what they are
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *("-freciprocal-math", "-ffp-contract=fast"),
]


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled kernels to the wheel, or leaves them beside their sources for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; called before the wheel is written."""
        folder = Path(self.root) / _KERNELS
        binary = runpy.run_path(str(folder / "library.py"))["binary"]
        for stale in folder.glob("*.so"):
            stale.unlink()
        for source in folder.glob("*.c"):
            target = binary(source)
            if not self._compile(source, target):
                return
            build_data["artifacts"].append(str(target.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"  # any Python loads them

    def _compile(self, source: Path, target: Path) -> bool:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            self.app.display_warning("no C compiler (cc): attention on CPUs will be slower")
            return False
        wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
        object_file = target.with_suffix(".o")
        # Linked without -fopenmp: the symbols shall come from the OpenMP library that torch has loaded.
        steps = (
            [compiler, *_FLAGS, *wide, "-c", str(source), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(target), "-lm"],
        )
        try:
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True, check=False)  # noqa: S603
                if done.returncode:
                    self.app.display_warning(f"{' '.join(step)} failed: {done.stderr[-2000:]}")
                    return False
        finally:
            object_file.unlink(missing_ok=True)
        return True
