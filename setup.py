"""Puts the files of ds_configs/ into the built package, as dsyolo/ds_configs/. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithReadyFiles(build_py):
    """Builds the package with the ready DeepSpeed JSON files. An editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._ready_files():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        ready = [] if self.editable_mode else [target for _, target in self._ready_files()]
        return [*super().get_outputs(include_bytecode), *ready]

    def _ready_files(self) -> list[tuple[str, str]]:
        folder = Path(self.build_lib, "dsyolo", "ds_configs")
        return [(str(path), str(folder / path.name)) for path in sorted(ROOT.glob("ds_configs/*.json"))]


setup(cmdclass={"build_py": BuildWithReadyFiles})
