"""Compiles the kernel where there is a compiler; without one, the install succeeds and plain torch serves."""

import os
import sysconfig
from glob import glob

from setuptools import Extension, setup

CSRC = "lowmem/kernels/csrc"

# The limited API has no free-threaded form: there, plain torch serves.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# What CFLAGS asks for comes before these, and would be overruled.
OPTIMIZE = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]

setup(
    ext_modules=[]
    if FREE_THREADED
    else [
        Extension(
            "lowmem.kernels._native",
            sources=sorted(glob(f"{CSRC}/*.c")),
            depends=sorted(glob(f"{CSRC}/*.h")),
            extra_compile_args=["-std=gnu11", "-ffp-contract=off", *OPTIMIZE],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
