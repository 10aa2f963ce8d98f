"""Builds the native kernels, the n-gram drafter and sampling; everything else is in pyproject.toml.

They are shared libraries for ctypes, not Python modules, so one wheel serves every Python 3. Without them the wheel
serves every system: on Windows, whose compilers do not know them, and where SPECDEC_PURE is set.
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MAC = sys.platform == "darwin"


class SharedLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


compiled = os.name != "nt" and "SPECDEC_PURE" not in os.environ
setup(
    cmdclass={"build_ext": SharedLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=compiled
    * [
        Extension(
            "specdec.runtimes.native._native",
            sources=sorted(glob("specdec/runtimes/native/*.c")),
            depends=sorted(glob("specdec/runtimes/native/*.h") + glob("specdec/runtimes/native/kernels/*")),
            # No -fopenmp for the linker: PyTorch's OpenMP library provides the threads. Apple's clang hides the option.
            # No contraction: fused multiply-adds only where the sources have them, so that all builds compute the same.
            extra_compile_args=["-O3", *["-Xclang"] * MAC, "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=["-s"] if not MAC else [],
            libraries=["m"],
            optional=True,  # without a C compiler the other runtimes serve
        ),
        Extension(
            "specdec.speculation._speculation",
            sources=["specdec/speculation/ngram.c", "specdec/speculation/sampling.c"],
            depends=["specdec/runtimes/native/calibrate.h", "specdec/runtimes/native/gumbel.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=["-s"] if not MAC else [],
            libraries=["m"],
            optional=True,  # without it, prompt-lookup drafts, and PyTorch samples
        ),
    ],
)
