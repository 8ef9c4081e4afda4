"""Sources of the domain code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from gather.containers import archived_code
from gather.packages import Folders
from gather.readers import code
from gather.text import one_file
from gather.writer import Source

KERNEL = re.compile(
    r"^[^/]+/(kernel|mm|lib|block|ipc|crypto|init|security|fs/(ext4|btrfs|xfs|proc|nfs|f2fs)"
    r"|net/(core|ipv4|ipv6|sched|netfilter)|virt|sound/core|drivers/(md|block|char|base|input|net/ethernet/intel))/"
)
LIBRARIES = ("pip:sympy", "pip:django", "pip:scikit-learn")
NOT_PYTHON = r"/test/|lib2to3/tests|idlelib/idle_test|pydoc_data"
NOT_GO = r"/vendor/|testdata|zsyscall|ztypes|zerrors|tables\.go|/syscall/"


def _kernel(at: Folders) -> Iterable[str]:
    return archived_code(one_file(at["deb:linux-source-6.1"], "usr/src/*.tar.xz"), KERNEL.search, (".c", ".h"))


def _libraries(at: Folders) -> Iterable[str]:
    return chain(*(code(at[package], "**/*.py", skip=r"/locale/|conf/locale") for package in LIBRARIES))


def _javascript(at: Folders) -> Iterable[str]:
    yield from code(at["npm:three"], "package/src/**/*.js", "package/examples/jsm/**/*.js", skip="/libs/")
    yield from code(at["npm:typescript"], "package/lib/*.d.ts", "package/lib/typescript.js", largest=12e6)


CODE = [
    Source("code", "c-linux", ("deb:linux-source-6.1",), "GPL-2", _kernel, 23, "documents"),
    Source("code", "python-stdlib", ("deb:libpython3.11-stdlib",), "PSF",
           lambda at: code(at["deb:libpython3.11-stdlib"], "**/*.py", skip=NOT_PYTHON), 16, "documents"),
    Source("code", "python-libs", LIBRARIES, "BSD-3", _libraries, 19, "documents"),
    Source("code", "go", ("deb:golang-1.19-src",), "BSD-3",
           lambda at: code(at["deb:golang-1.19-src"], "**/*.go", skip=NOT_GO), 11, "documents"),
    Source("code", "rust", ("deb:rust-src",), "MIT / Apache-2.0",
           lambda at: code(at["deb:rust-src"], "**/library/**/*.rs", skip=r"stdarch|/vendor/|/core_arch/"), 9,
           "documents"),
    Source("code", "javascript", ("npm:three", "npm:typescript"), "MIT / Apache-2.0", _javascript, 8, "documents"),
]  # fmt: skip
