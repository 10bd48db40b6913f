"""Adds to what pyproject.toml says: the environment's torchvision hook is beside the package, editable or not, and a
wheel holds the benchmarks as amclip_ds.benchmarks (a checkout has them at its top).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = sorted(Path("environment").glob("amclip_ds_torchvision.*"))
BENCHMARKS = [
    path
    for path in sorted(Path("benchmarks").glob("*.py"))
    if path.stem != "mutants" and "from tests" not in path.read_text()
]


class BuildPy(build_py):
    """An editable install builds no package; its wheel holds what is in the install command's folder."""

    def run(self):
        super().run()
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        for file in HOOK:
            self.copy_file(str(file), str(Path(folder) / file.name), preserve_mode=False)
        if not self.editable_mode:
            inside = Path(folder) / "amclip_ds" / "benchmarks"
            self.mkpath(str(inside))
            for file in BENCHMARKS:  # those that measure the tests themselves need a checkout
                text = file.read_text().replace("from benchmarks", "from amclip_ds.benchmarks")
                (inside / file.name).write_text(text)


setup(cmdclass={"build_py": BuildPy})
