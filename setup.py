"""Builds the C++ kernels into the package; everything else is in pyproject.toml.

One shared library, for which any C++20 compiler will do; each instruction set is a file of its own that says itself
what it may use. No compiler, no library: the package works without it, through PyTorch, and says so when it runs.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("puna/kernels/native")
LIBRARY = "puna.kernels.native.libpuna"


class BuildKernels(build_ext):
    """Compiles the kernels; a failure is reported and leaves the package without them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # it is not a Python module: no name of Python's version in it

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"the C++ kernels were not built ({error}); Puna will compute with PyTorch alone")

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.get_ext_fullpath(ext.name)).is_file() or self._built(ext) for ext in self.extensions):
            super().copy_extensions_to_source()

    def _built(self, ext: Extension) -> bool:
        return (Path(self.build_lib) / self.get_ext_filename(ext.name)).is_file()


KERNELS = Extension(
    LIBRARY,
    sources=sorted(str(file) for file in NATIVE.glob("*.cpp")),
    depends=sorted(str(file) for file in NATIVE.glob("*.h")),
    language="c++",
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g0",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
        "-w",
    ],
    extra_link_args=["-pthread", "-ldl"],
)

setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels})
