"""The wheel with kernels in it, compiled where it is built: the setuptools commands that pyproject.toml names.

setuptools loads this file by itself, so that it imports nothing of the package.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = "convmixer/cpu/ahead"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        command = [sys.executable, "-m", "convmixer.cpu.compiler", str(Path(self.build_lib, KERNELS).absolute())]
        if not self.editable_mode and subprocess.run(command, check=False).returncode:
            self.warn(
                "not all CPU kernels could be compiled; they are made at their first use, where there is a compiler"
            )


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python of this platform if there are kernels in it."""
        tag = super().get_tag()
        if not any(Path(self.bdist_dir, KERNELS).glob("*.so")):
            return tag
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")
