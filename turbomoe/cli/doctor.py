"""``turbomoe doctor``: what this machine offers, and what stands in the way, each with its next step."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version

from turbomoe import __version__
from turbomoe.cli.options import add_common
from turbomoe.hardware.checks import Check, machine_checks


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = "Versions, CPU, memory, GPUs, compiler, state folder, demo models; exit 1 when something must be mended."
    parser = subparsers.add_parser(
        "doctor", help="what this machine offers and what stands in the way", description=text
    )
    add_common(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print every check; 1 when one of them is a problem."""
    checks = [*software_checks(), *machine_checks(), native_check(), *demo_checks()]
    if args.json:
        print(json.dumps({"ok": not _problems(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(render(checks))
    return 1 if _problems(checks) else 0


def software_checks() -> list[Check]:
    """turbomoe, Python, every declared requirement and its range, and what is optional."""
    python_ok = sys.version_info >= (3, 11)
    return [
        Check("turbomoe", __version__),
        Check(
            "python", platform.python_version(), "ok" if python_ok else "problem", "" if python_ok else "Install 3.11+"
        ),
        *(requirement_check(text) for text in declared_requirements()),
        _triton_check(),
    ]


def declared_requirements() -> list[str]:
    """What turbomoe's own metadata asks for, extras left out; transformers alone when it runs uninstalled."""
    try:
        declared = requires("turbomoe") or []
    except PackageNotFoundError:
        from turbomoe.upstream.versions import RANGE

        return ["torch", RANGE, "tokenizers"]
    return [text for text in declared if "extra ==" not in text]


def requirement_check(text: str) -> Check:
    """Whether what is installed satisfies ``text``, a requirement such as ``torch>=2.11``."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "not installed", "problem", f"pip install '{text}'")
    if requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, found)
    return Check(requirement.name, f"{found}, outside {requirement.specifier}", "problem", f"pip install '{text}'")


def _triton_check() -> Check:
    try:
        return Check("triton", version("triton"))
    except PackageNotFoundError:
        return Check("triton", "not installed (nothing on the CPU path needs it)")


def native_check() -> Check:
    """What computes packed weights on the CPU, and why."""
    from turbomoe.native.library import describe_core, find_library

    advice = "" if find_library() else "python -m turbomoe.native.build (needs a C compiler)"
    return Check("native core", describe_core(), "note" if advice else "ok", advice)


def demo_checks() -> list[Check]:
    """The ``demo:`` models, installed or not (their bytes are checked when they are opened)."""
    from turbomoe.files.demo import DEMOS

    return [
        Check(f"demo:{name}", str(path))
        if (path := model.find())
        else Check(f"demo:{name}", "not installed", "note", model.install)
        for name, model in DEMOS.items()
    ]


def render(checks: list[Check]) -> str:
    """One line a check, its advice below it, and a last line that sums up."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8}{check.name:<{width}}  {check.value}")
        if check.advice:
            lines.append(f"{'':8}{'':<{width}}  -> {check.advice}")
    problems = len(_problems(checks))
    lines.append(f"{problems} to mend" if problems else "all well")
    return "\n".join(lines)


def _problems(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.state == "problem"]
