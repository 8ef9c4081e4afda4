"""HTML and XML pages as plain text (needs ``lxml``)."""

from __future__ import annotations

import re
import sys
from typing import Any

from lxml import etree
from lxml import html as lxml_html

from gather.text import tidy

DROP = frozenset("script style nav header footer noscript svg form button head iframe template".split())
LINES = frozenset(
    "p div br li ul ol tr table h1 h2 h3 h4 h5 h6 pre blockquote dl dt dd section article hr figure aside main "
    "tbody thead".split()
)
PARAGRAPHS = frozenset("p h1 h2 h3 h4 table ul ol dl blockquote".split())
MAY_BE_JUNK = frozenset("div a span ul table td p".split())
JUNK = re.compile(
    r"(nav|sidebar|footer|related|breadcrumb|toc\b|headerlink|copyright|menu|t-navbar|editsection|"
    r"mw-jump|printfooter|catlinks|NavH|search|linenos|index-?link)",
    re.I,
)
XML_LINES = frozenset("p title item note section para code screen td desc".split())
XML_DROP = frozenset("info credit license media mediaobject legalnotice articleinfo bookinfo revhistory".split())
DEEPEST = 20_000


def html_text(page: str) -> str:
    """A page without navigation, scripts and footers; empty for what is no HTML."""
    sys.setrecursionlimit(DEEPEST)
    try:
        root = lxml_html.document_fromstring(page.encode(), parser=lxml_html.HTMLParser(encoding="utf-8"))
    except etree.LxmlError:
        return ""
    body = root.find("body")
    out: list[str] = []
    _walk_html(root if body is None else body, out)
    text = re.sub(r"- \s*\n+\s*", "- ", "".join(out).replace("¶", ""))
    return tidy(re.sub(r"(?m)^ +(?=\S)", lambda match: match[0] if len(match[0]) > 1 else "", text))


def _walk_html(element: Any, out: list[str]) -> None:
    tag = element.tag if isinstance(element.tag, str) else None
    if tag is None or tag in DROP or _is_junk(element, tag):
        return
    if tag == "pre":
        out.append("\n\n" + "".join(element.itertext()).strip("\n") + "\n\n")
        return
    out.append(_opening(tag))
    out.append(_flat(element.text))
    for child in element:
        _walk_html(child, out)
        out.append(_flat(child.tail))
    if tag in LINES:
        out.append("\n")


def _is_junk(element: Any, tag: str) -> bool:
    names = f"{element.get('class') or ''} {element.get('id') or ''}"
    return tag in MAY_BE_JUNK and JUNK.search(names) is not None


def _opening(tag: str) -> str:
    if tag in ("td", "th"):
        return " "
    start = "\n\n" if tag in PARAGRAPHS else "\n" if tag in LINES else ""
    return start + ("- " if tag == "li" else "")


def _flat(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


def xml_text(page: str) -> str:
    """A Mallard or DocBook page without its front matter; empty for what is no XML."""
    try:
        root = etree.fromstring(page.encode(), etree.XMLParser(recover=True, resolve_entities=False))
    except etree.LxmlError:
        return ""
    if root is None:
        return ""
    _drop_front_matter(root)
    out: list[str] = []
    _walk_xml(root, out)
    return tidy("\n".join(line.strip() for line in "".join(out).split("\n")))


def _drop_front_matter(root: Any) -> None:
    for element in list(root.iter()):
        if element.getparent() is None or _local(element) not in XML_DROP:
            continue
        for child in list(element):
            element.remove(child)
        element.text = ""


def _walk_xml(element: Any, out: list[str]) -> None:
    if (name := _local(element)) is None:
        return
    out += ["\n\n" if name in XML_LINES else "", _flat(element.text)]
    for child in element:
        _walk_xml(child, out)
        out.append(_flat(child.tail))
    if name in XML_LINES:
        out.append("\n")


def _local(element: Any) -> str | None:
    """The tag without its namespace; None for comments and the like."""
    return str(etree.QName(element).localname) if isinstance(element.tag, str) else None
