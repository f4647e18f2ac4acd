"""Words of the field in the texts of a page: each use leads to its definition, which stands once in the page's key."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from ioi_mamba.model.glossary import WORDS, Word

_FORMS = {form: word for word in WORDS for form in (word.word, *word.forms)}
_ANY = re.compile(
    r"(?<![\w-])(" + "|".join(map(re.escape, sorted(_FORMS, key=lambda form: -len(form)))) + r")(?![\w-])"
)


def anchor(word: Word) -> str:
    """The id of a word's definition on the page."""
    return "term-" + re.sub(r"\W+", "-", word.word)


def marked(text: str) -> Markup:
    """The text, escaped, in which each word of the glossary is a link to its definition."""
    parts, end = [], 0
    for found in _ANY.finditer(text):
        name = anchor(_FORMS[found[0]])
        parts.append(escape(text[end : found.start()]))
        parts.append(Markup('<a class="term" href="#{0}" aria-describedby="{0}">{1}</a>').format(name, found[0]))
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])
