"""Compiles the kernel where there is a compiler; without one, the install succeeds and plain torch serves."""

import os
import sys
import sysconfig
from glob import glob
from multiprocessing.pool import ThreadPool

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = "lowmem/kernels/csrc"

# Plain torch serves where the kernel cannot be built: the limited API has no free-threaded form, and MSVC has neither
# the atomics of GNU C nor its functions for one instruction set.
PLATFORM = sysconfig.get_platform()
HAS_KERNEL = not sysconfig.get_config_var("Py_GIL_DISABLED") and not PLATFORM.startswith("win-")

# What CFLAGS asks for comes before these, and would be overruled. Python's own flags ask for debugging symbols, which
# make the library ten times as large and take a third of the compiler's time.
ASKED = os.environ.get("CFLAGS", "")
FLAGS = [default for option, default in (("-O", "-O3"), ("-g", "-g0")) if option not in ASKED]


class BuildInParallel(build_ext):
    """Compile the files, one for each instruction set, side by side: setuptools does so with extensions only."""

    def build_extension(self, ext):
        """Hand the compiler one file at a time, from as many threads as there are cores."""
        print("lowmem: compiling the kernel takes 2 to 3 minutes on two cores", file=sys.stderr, flush=True)
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            self.mkpath(os.path.join(options["output_dir"], CSRC))  # which all of them would make
            with ThreadPool(os.cpu_count()) as pool:
                each = pool.map(lambda source: compile_all([source], **options), sources, chunksize=1)
            return [made for objects in each for made in objects]

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


KERNEL = Extension(
    "lowmem.kernels._native",
    sources=sorted(glob(f"{CSRC}/*.c"), reverse=True),  # portable.c takes longest: it begins
    depends=sorted(glob(f"{CSRC}/*.h")),
    extra_compile_args=["-std=gnu11", "-ffp-contract=off", *FLAGS],
    py_limited_api=True,
    optional=not os.environ.get("LOWMEM_REQUIRE_KERNEL"),  # who builds wheels for others sets it
)

setup(
    cmdclass={"build_ext": BuildInParallel},
    ext_modules=[KERNEL] if HAS_KERNEL else [],
    # A wheel without the kernel names its platform, so that no other takes it for its own.
    options={"bdist_wheel": {"py_limited_api": "cp311"} if HAS_KERNEL else {"plat_name": PLATFORM}},
)
