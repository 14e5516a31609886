"""Builds the native libraries by CMakeLists.txt. LOSA_NO_EXT=1: Python and Triton only. LOSA_CUDA=OFF: no CUDA half."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SETTINGS = runpy.run_path(str(ROOT / "losa_kernels/settings.py"))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.build_lib).resolve() / "losa_kernels"
        build = ROOT / "build" / f"cmake-{sys.version_info.major}.{sys.version_info.minor}"
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLOSA_VERSION={self.distribution.get_version()}",
            f"-DLOSA_OUTPUT={target}",
            f"-DLOSA_CUDA={int(SETTINGS['CUDA']())}",
            f"-DLOSA_CUDA_ARCHS={SETTINGS['CUDA_ARCHS']().replace(',', ';')}",
        ]
        # The cmake and ninja of this environment first, activated or not.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        ninja = shutil.which("ninja", path=path)
        if ninja is None or shutil.which("cmake", path=path) is None:
            raise SystemExit("losa: cmake and ninja are needed to build the native code; LOSA_NO_EXT=1 leaves it out")
        options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")  # the one in CMake's cache may be of an environment now gone
        self.remove_libraries(target)  # an earlier build may have had a CUDA half that this one has not
        for command in (["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options], ["cmake", "--build", build]):
            subprocess.run(["env", f"PATH={path}", *map(str, command)], check=True)

    def copy_extensions_to_source(self):
        self.remove_libraries(ROOT / "losa_kernels")
        for library in (Path(self.build_lib) / "losa_kernels").glob("*.so"):
            self.copy_file(library, ROOT / "losa_kernels" / library.name)

    @staticmethod
    def remove_libraries(folder):
        for library in folder.glob("*.so"):
            library.unlink()


setup(
    ext_modules=[] if SETTINGS["NO_EXT"]() else [Extension("losa_kernels._build_info", [])],
    cmdclass={"build_ext": CMakeBuild},
)
