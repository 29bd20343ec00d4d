"""Compiles the kernel where there is a compiler; without one, the install succeeds and plain torch serves."""

import gzip
import os
import re
import shlex
import sys
import sysconfig
import tarfile
from contextlib import suppress
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

CSRC = "lowmem/kernels/csrc"
FACTS = run_path("lowmem/version.py")
REINSTALL, ADDRESS, TAG = FACTS["reinstall_command"](), FACTS["ADDRESS"], f"v{FACTS['__version__']}"

# The same tree gives the same bytes, whenever and by whom it is built: wheel reads the variable.
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))  # 1980, from which on zip files have dates

# Plain torch serves where the kernel cannot be built: the limited API has no free-threaded form, and MSVC has neither
# the atomics of GNU C nor its functions for one instruction set.
PLATFORM = sysconfig.get_platform()
HAS_KERNEL = not sysconfig.get_config_var("Py_GIL_DISABLED") and not PLATFORM.startswith("win-")

# What CFLAGS asks for comes before these, and would be overruled. Distributions ask for -O2 of every package: only
# another level is meant for this one. Python's own flags ask for debugging symbols, which make the library ten times
# as large and take a third of the compiler's time.
ASKED = shlex.split(os.environ.get("CFLAGS", ""))
LEVELS = [flag for flag in ASKED if flag.startswith("-O")]
FLAGS = ["-O3"] * (LEVELS[-1:] in ([], ["-O2"])) + ["-g0"] * (not any(flag.startswith("-g") for flag in ASKED))


class BuildInParallel(build_ext):
    """Compile the files, one for each instruction set, side by side: setuptools does so with extensions only."""

    failed = False  # so that plain torch serves what is built

    def build_extension(self, ext):
        """Hand the compiler one file at a time, from as many threads as there are cores."""
        say("compiling the kernel takes about a minute on two cores")
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            self.mkpath(os.path.join(options["output_dir"], CSRC))  # which all of them would make

            def compile_one(source):
                try:
                    return compile_all([source], **options)
                except CompileError as error:
                    raise CompileError(f"{source}: {error}") from error

            with ThreadPool(os.cpu_count()) as pool:
                each = pool.map(compile_one, sources, chunksize=1)
            return [made for objects in each for made in objects]

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        except Exception as error:
            BuildInParallel.failed = True
            with suppress(FileNotFoundError):
                os.remove(self.get_ext_fullpath(ext.name))  # of an earlier build
            if ext.optional:
                say(f"the kernel was not compiled: {error}")
                say(f"plain torch will serve, up to 30 times slower; install a C compiler, and then: {REINSTALL}")
            raise
        finally:
            self.compiler.compile = compile_all


class TagByKernel(bdist_wheel):
    """Name the wheel by what is in it: pip keeps wheels, and takes one without the kernel for the other otherwise."""

    def get_tag(self):
        """Return the tags of Python, ABI and platform."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if BuildInParallel.failed else (python, abi, platform)


class SameBytes(sdist):
    """Write a source distribution without the dates, owners and permissions of the files that it is made of."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """Write ``base_name``.tar.gz of the folder ``base_dir``."""
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def neutral(entry):
            executable = entry.isdir() or entry.mode & 0o100
            entry.mtime, entry.mode = EPOCH, 0o755 if executable else 0o644
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            return entry

        path = f"{base_name}.tar.gz"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=neutral)  # sorted
        return path


def description():
    """Return README.md as the package index shows it: what leads to a file here leads to the project's address."""
    text = Path("README.md").read_text(encoding="utf8")
    if not ADDRESS:
        return text

    def absolute(found):
        kind = "raw" if found[2].endswith(".svg") else "blob"
        return f"{found[1]}{ADDRESS}/{kind}/{TAG}/{found[2]}"

    return re.sub(r"""(\]\(|(?:src|srcset|href)=")(?![\w+.-]+:|#)([^)"\s]+)""", absolute, text)


def say(line):
    """Print a line to the log of the installation."""
    print(f"lowmem: {line}", file=sys.stderr, flush=True)


KERNEL = Extension(
    "lowmem.kernels._native",
    sources=sorted(glob(f"{CSRC}/*.c"), reverse=True),  # portable.c takes longest: it begins
    depends=sorted(glob(f"{CSRC}/*.h")),
    extra_compile_args=["-std=gnu11", "-ffp-contract=off", *FLAGS],
    py_limited_api=True,
    optional=not os.environ.get("LOWMEM_REQUIRE_KERNEL"),  # who builds wheels for others sets it
)

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    project_urls={"Source": ADDRESS, "Changes": f"{ADDRESS}/blob/{TAG}/CHANGELOG.md"} if ADDRESS else {},
    cmdclass={"build_ext": BuildInParallel, "bdist_wheel": TagByKernel, "sdist": SameBytes},
    ext_modules=[KERNEL] if HAS_KERNEL else [],
    # A wheel without the kernel names its platform, so that no other takes it for its own.
    options={"bdist_wheel": {"py_limited_api": "cp311"} if HAS_KERNEL else {"plat_name": PLATFORM}},
)
