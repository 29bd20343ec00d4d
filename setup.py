"""Compiles the kernel where there is a compiler; without one, the install succeeds and plain torch serves."""

from setuptools import Extension, setup

CSRC = "lowmem/kernels/csrc"

setup(
    ext_modules=[
        Extension(
            "lowmem.kernels._native",
            sources=[f"{CSRC}/{name}.c" for name in ("module", "portable", "avx2", "avx512")],
            depends=[f"{CSRC}/{name}.h" for name in ("kernel", "body")],
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
