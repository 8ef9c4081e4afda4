"""Sources of the domain multilingual: eleven languages, mostly manuals in translation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gather.containers import sword, translations
from gather.english import WESNOTH
from gather.manuals import roff_text
from gather.markup import xml_text
from gather.packages import Folders
from gather.readers import fortunes, mostly, pages, texts, wesnoth
from gather.writer import Source

HANDBOOK, GNOME, GUIDE = "deb:debian-handbook", "deb:gnome-user-docs", "deb:installation-guide-amd64"
LICENCE = "mixed free (GPL, CC-BY-SA, MPL, public domain)"


@dataclass(frozen=True)
class Language:
    """The folder of a language in each package that holds several ("" where it has none), and packages of its own."""

    code: str
    handbook: str = ""
    gnome: str = ""
    guide: str = ""
    office: str = ""
    wesnoth: str = ""
    manpages: str = ""
    reference: str = ""
    fortunes: str = ""
    books: tuple[str, ...] = ()
    bible: str = ""

    @property
    def packages(self) -> tuple[str, ...]:
        """Everything that ``documents`` reads."""
        shared = {HANDBOOK: self.handbook, GNOME: self.gnome, GUIDE: self.guide}
        own = (self.office, self.manpages, self.reference, self.fortunes, *self.books, self.bible)
        packages = [package for package, folder in shared.items() if folder] + [package for package in own if package]
        return tuple(packages) + (WESNOTH if self.wesnoth else ())

    def documents(self, at: Folders) -> Iterable[str]:
        """All documents of the language, without paragraphs in English."""
        return mostly(self.code, self._documents(at))

    def _documents(self, at: Folders) -> Iterable[str]:
        yield from self._shared(at)
        if self.office:
            yield from pages(at[self.office], "**/help/*/text/**/*.html")
        if self.manpages:
            yield from texts(at[self.manpages], "**/man*/*.gz", through=roff_text)
        if self.reference:
            yield from pages(at[self.reference], "usr/share/debian-reference/*.html")
        if self.wesnoth:
            roots = [at[package] for package in WESNOTH]
            yield from wesnoth(roots, translations(roots, self.wesnoth))
        if self.fortunes:
            yield from fortunes(at[self.fortunes])
        for package in self.books:
            yield from pages(at[package], "**/*.html", "**/*.htm")
        if self.bible:
            yield from sword(at[self.bible])

    def _shared(self, at: Folders) -> Iterable[str]:
        if self.handbook:
            yield from pages(f"{at[HANDBOOK]}/usr/share/doc/debian-handbook/html/{self.handbook}", "*.html")
        if self.gnome:
            root = f"{at[GNOME]}/usr/share/help/{self.gnome}"
            yield from texts(root, "**/*.page", "**/*.xml", "**/*.docbook", through=xml_text)
        if self.guide:
            yield from pages(f"{at[GUIDE]}/usr/share/doc/installation-guide-amd64/{self.guide}", "*.html")


def _language(code: str, handbook: str, gnome: str, guide: str, **own: str | tuple[str, ...]) -> Language:
    names = {"office": "libreoffice-help", "manpages": "manpages", "reference": "debian-reference"}
    packages = {field: f"deb:{name}-{own.pop(field)}" for field, name in names.items() if field in own}
    return Language(code, handbook, gnome, guide, **packages, **own)  # type: ignore[arg-type]


LANGUAGES = [
    _language("de", "de-DE", "de", "de", office="de", wesnoth="de", manpages="de", reference="de",
              fortunes="deb:fortunes-de", books=("deb:debian-paketmanagement-buch",)),
    _language("fr", "fr-FR", "fr", "fr", office="fr", wesnoth="fr", manpages="fr", reference="fr"),
    _language("es", "es-ES", "es", "es", office="es", wesnoth="es", manpages="es", reference="es",
              fortunes="deb:fortunes-es", bible="deb:sword-text-sparv"),
    _language("it", "it-IT", "it", "it", office="it", wesnoth="it", reference="it", fortunes="deb:fortunes-it"),
    _language("pt", "pt-BR", "pt_BR", "pt", office="pt-br", wesnoth="pt_BR", reference="pt",
              books=("deb:focalinux-html",)),
    _language("ru", "ru-RU", "ru", "ru", office="ru", wesnoth="ru", manpages="ru", fortunes="deb:fortunes-ru"),
    _language("pl", "pl-PL", "pl", "", office="pl", wesnoth="pl", manpages="pl"),
    _language("nl", "nl-NL", "nl", "nl"),
    _language("sv", "sv-SE", "sv", "sv"),
    _language("cs", "", "cs", "cs", wesnoth="cs", fortunes="deb:fortunes-cs"),
    _language("id", "id-ID", "id", ""),
]  # fmt: skip

MULTILINGUAL = [
    Source("multilingual", one.code, one.packages, LICENCE, one.documents, 5.6, shortest=200) for one in LANGUAGES
]
