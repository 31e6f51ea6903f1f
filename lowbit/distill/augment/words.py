"""Which words of a text may be replaced."""

from __future__ import annotations

import re
from collections.abc import Collection

# A word of letters only between spaces; brackets, quotes and the end of a sentence may touch it ("'s" is no word).
_WORD = re.compile(r"""(?<!\S)["(\[“]*([^\W\d_]+)[.,;:!?"')\]”]*(?!\S)""")

Span = tuple[int, int]


# English words of the closed classes, negations included: they carry grammar, and another one makes another sentence.
# (scikit-learn's list has words like "thin", "serious" and "interest" besides.)
_CLOSED_CLASSES = """
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one this that these those who whom whose which what
    a an the some any no none all both each every either neither few more most much many other another such same own
    am is are was were be been being have has had having do does did doing done can could may might must shall should
    will would ought not never nor cannot
    about above across after against along among around as at because before behind below beneath beside besides
    between beyond but by despite down during except for from if in inside into like near of off on once onto or out
    outside over past per since so than though although through throughout till to toward towards under until unless
    up upon via when where whereas whether while why how with within without yet and
    again also ever even further here just only quite rather then there too very however
"""
STOP_WORDS = frozenset(_CLOSED_CLASSES.split())


def replaceable(text: str, never: Collection[str]) -> list[Span]:
    """Where words of letters only begin and end in a text; but for those whose lower case is in `never`."""
    found = (match.span(1) for match in _WORD.finditer(text))
    return [(start, end) for start, end in found if text[start:end].lower() not in never]


def replace(text: str, changes: dict[Span, str]) -> str:
    """The text with other words at some places; "Film" becomes "Movie" by "movie"."""
    for (start, end), word in sorted(changes.items(), reverse=True):
        word = word.title() if text[start:end].istitle() and word.islower() else word
        text = text[:start] + word + text[end:]
    return text
