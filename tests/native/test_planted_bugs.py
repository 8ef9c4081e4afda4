"""The core's own tests catch planted bugs: each is built into a copy of the sources and must be reported."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from turbomoe.native.build import SOURCE_DIR

# What goes wrong, where, and how: the portable level alone, which builds in seconds.
BUGS = {
    "a zero point is forgotten": ("kernels.h", "if (ZERO(F) == 0)", "if (ZERO(F) <= 8)"),
    "a min is added": ("kernels.h", "return vf_fnma(s.less", "return vf_fma(s.less"),
    "the end of a row is left out": ("kernels.h", "if (g < groups)\n", "if (g + 1 < groups)\n"),
    "padding is not cleared": ("inputs.c", "level->quantise(zeros,", "if (g < 0) level->quantise(zeros,"),
    "a fifth bit is lost": ("kernels.h", "*hi = vb_or(*hi, hi_bits);", "*hi = *hi;"),
    "a pair takes its neighbour's place": ("routes.c", "slot->first + slot->count++", "slot->first + slot->count"),
    "a row reads another row": ("routes.c", "r->row[r->place[i]] = i / top", "r->row[r->place[i]] = 0"),
    "weights are those of another expert": ("experts.c", "call->weights[j]", "call->weights[r * call->top]"),
    "a bias is added twice": ("experts.c", "to[i] += bias[i]", "to[i] += 2 * bias[i]"),
    "h is rounded before it is whole": ("experts.c", "memory_order_acq_rel) == 1)", "memory_order_acq_rel) == 2)"),
    "units are lost": ("pool.c", "n = n > most ? most : n;", "n = n > most ? most + 1 : n;"),
    "a phase opens early": ("pool.c", "memory_order_acq_rel) == done)", "memory_order_acq_rel) <= done + 1)"),
    "many tokens share a scale": (
        "kernels_panel.h",
        "vf_set(x[t].scale[scale_at(g)])",
        "vf_set(x[0].scale[scale_at(g)])",
    ),
    "a refusal is forgotten": ("experts.c", "call->status = TM_ERR_ROUTE", "call->status = TM_OK"),
}
TEST = Path(__file__).parent / "c" / "core_test.c"


def copy_of_the_sources(folder: Path) -> Path:
    """For the portable level alone."""
    source = folder / "src"
    shutil.copytree(SOURCE_DIR, source, ignore=shutil.ignore_patterns("level_avx*"))
    dispatch = source / "dispatch.c"
    dispatch.write_text(dispatch.read_text().replace("#ifdef __x86_64__", "#if 0"))
    return source


def build_and_run(source: Path, cases: int) -> subprocess.CompletedProcess[str]:
    binary, files = str(source / "core_test"), [str(p) for p in sorted(source.glob("*.c"))]
    flags = [f"-I{source}", "-std=gnu11", "-O1", "-DUNROLL=", "-ffp-contract=off", "-pthread", "-w"]
    subprocess.run(["cc", *flags, *files, str(TEST), "-lm", "-o", binary], check=True)
    return subprocess.run([binary, str(cases), "1"], capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or platform.system() != "Linux", reason="needs a C compiler")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    name, right, wrong = BUGS[bug]
    source = copy_of_the_sources(tmp_path)
    text = (source / name).read_text()
    assert right in text, f"{name} has changed: plant this bug anew"
    (source / name).write_text(text.replace(right, wrong, 1))
    try:
        done = build_and_run(source, 1000)
    except subprocess.TimeoutExpired:
        return  # it hangs: seen, too
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or platform.system() != "Linux", reason="needs a C compiler")
def test_without_bugs_it_passes(tmp_path: Path) -> None:
    done = build_and_run(copy_of_the_sources(tmp_path), 300)
    assert (done.returncode, done.stderr) == (0, "")
