"""Manuals as plain text: roff man pages, reStructuredText, Perl's POD."""

from __future__ import annotations

import re

from gather.text import tidy

ROFF_ESCAPES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\\(bu", "-"),
        (r"\\\((?:em|en|hy)", "-"),
        (r"\\\((?:aq|cq|oq)", "'"),
        (r"\\\((?:lq|rq|dq)", '"'),
        (r"\\\((?:co)", "(C)"),
        (r"\\\(..", ""),
        (r"\\\[(?:aq|cq|oq)\]", "'"),
        (r"\\\[(?:lq|rq|dq)\]", '"'),
        (r"\\\[[^\]]*\]", ""),
        (r"\\f(?:\[[^\]]*\]|\(..|.)", ""),
        (r"\\s[-+]?\d", ""),
        (r"\\-", "-"),
        (r"\\&", ""),
        (r"\\e", r"\\"),
        (r"\\[ ~0|^%:/]", " "),
        (r"\\\*(?:\(..|\[[^\]]*\]|.)", ""),
        (r"\\c$", ""),
    ]
]
HEADINGS = frozenset("SH SS Sh Ss".split())
BREAKS = frozenset("PP P LP IP TP sp Pp HP TQ RE RS It".split())
WORDS = frozenset("B I SM SB Nm Nd Em Fl Ar Cm Pa Xr Sy Dq Ql Li Va Ev Dv Er".split())
JOINED = frozenset("BR RB IR RI BI IB".split())
MDOC_NOISE = frozenset("Fl Ar Cm Ns Xo".split())


class _Roff:
    """One man page: finished lines, the paragraph being filled, and whether lines are kept as they are."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.paragraph: list[str] = []
        self.literal = False

    def flush(self) -> None:
        if self.paragraph:
            text = re.sub(r"\( ", "(", " ".join(self.paragraph))
            self.out.append(re.sub(r" +([,.;:)])(?=\s|$)", r"\1", text))
            self.paragraph.clear()

    def macro(self, name: str, words: list[str]) -> None:
        if name in ("nf", "EX", "Bd"):
            self._break()
            self.literal = True
        elif name in ("fi", "EE", "Ed"):
            self.literal = False
            self.out.append("")
        elif name == "TH":
            self.out.append("(".join(words[:2]) + ")\n")
        elif name in HEADINGS:
            self.flush()
            self.out.append("\n" + " ".join(words) + "\n")
        elif name in BREAKS:
            self._break()
            self.paragraph += _label(name, words)
        elif name in WORDS or name in JOINED:
            self._target().append((" " if name in WORDS else "").join(words))

    def line(self, line: str) -> None:
        if line.startswith("."):
            return
        if not line.strip():
            self._break()
        else:
            self._target().append(line if self.literal else line.strip())

    def _break(self) -> None:
        self.flush()
        self.out.append("")

    def _target(self) -> list[str]:
        return self.out if self.literal else self.paragraph


def _label(name: str, words: list[str]) -> list[str]:
    """What a list item begins with; bullets and numbers are left out."""
    if name == "IP" and words and words[0] not in ("-", "*") and not words[0].isdigit():
        return words[:1]
    return [" ".join(word for word in words if word not in MDOC_NOISE)] if name == "It" else []


def roff_text(source: str) -> str:
    """A man page in the man or mdoc macros."""
    page, skipping = _Roff(), False
    for line in source.split("\n"):
        if line.startswith(('.\\"', "'\\\"", '\\"')):
            continue
        if re.match(r"^[.'] *(ig|de|TS)\b", line):
            skipping = True
        elif skipping:
            skipping = not line.startswith(("..", ".TE"))
        else:
            _roff_line(page, line)
    page.flush()
    return tidy("\n".join(page.out))


def _roff_line(page: _Roff, line: str) -> None:
    line = re.sub(r'\\".*$', "", line)
    for pattern, replacement in ROFF_ESCAPES:
        line = pattern.sub(replacement, line)
    if match := re.match(r"^[.'] *(\w+)\s*(.*)$", line):
        words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', match[2].strip())]
        page.macro(match[1], words)
    else:
        page.line(line)


RST_BLOCKS = re.compile(
    r"(?m)^\.\. (SPDX|_[^\n]*:|highlight|index|currentmodule|sectionauthor|moduleauthor|include|kernel-doc|toctree"
    r"|image|figure|contents|only|role|default-domain)[^\n]*\n(?:[ \t]+[^\n]*\n|\n(?=[ \t]))*"
)
RST_DIRECTIVES = re.compile(
    r"(?m)^[ \t]*\.\. (note|warning|seealso|versionadded|versionchanged|deprecated|tip|important|code-block|function"
    r"|class|classmethod|staticmethod|method|data|attribute|exception|c:function|c:type|option|describe|productionlist"
    r"|rubric|module|impl-detail|availability)::"
)
SPOKEN = {"note": "Note:", "warning": "Warning:", "seealso": "See also:"}


def rst_text(source: str) -> str:
    """reStructuredText without directives, roles and link targets."""
    source = RST_BLOCKS.sub("", source)
    source = RST_DIRECTIVES.sub(lambda match: SPOKEN.get(match[1], ""), source)
    source = re.sub(r":[\w:+-]+:`~?!?([^`<]+?)(?: <[^>`]*>)?`", r"\1", source)
    source = re.sub(r"``([^`]*)``", r"\1", source)
    return tidy(re.sub(r"`([^`<\n]+) <[^>`]*>`_+", r"\1", source))


def pod_text(source: str) -> str:
    """Perl's documentation format."""
    source = re.sub(r"(?ms)^=(begin|for)\b.*?^=(end)\b[^\n]*", "", source)
    source = re.sub(r"(?m)^=(head\d|item)\s+", "", source)
    source = re.sub(r"(?m)^=\w+.*$", "", source)
    for _ in range(3):  # codes are nested, seldom deeper
        source = re.sub(r"[BICFSX]<<+ (.*?) >>+", r"\1", source)
        source = re.sub(r"[BICFS]<([^<>]*)>", r"\1", source)
        source = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda match: match[1] or match[2], source)
        source = re.sub(r"[XZ]<[^<>]*>", "", source)
    return tidy(source.replace("E<lt>", "<").replace("E<gt>", ">"))
