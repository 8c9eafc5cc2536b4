"""Text of any origin in Markdown: it is read as it was written, and makes no markup. Imports no torch."""

from __future__ import annotations

import re

from .templating import visible


# An interval is the only thing in brackets that stays as it is, unless what follows makes a link of it.
_INTERVAL = r"\[[-+.\d\s,e%]+\](?![(\[:])"
_SPECIAL = re.compile(
    rf"(?P<interval>{_INTERVAL})"
    r"|[\\`*\[\]|~$@]"
    r"|<(?=[a-zA-Z/!?])"  # a tag or an autolink; `p < 0.01` is none
    r"|&(?=#|[a-zA-Z])"  # an entity
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; within a word it is none
    r"|:(?=//)|(?i:(?<=\bwww)\.|(?<=\bmailto):|(?<=\bxmpp):)"  # addresses that GitHub makes links of
)
_BEGINNING = re.compile(
    r"(?:(?P<mark>#{1,6}|[-+>=]+)|(?P<number>\d{1,9})(?P<end>[.)]))(?=\s|$)|(?P<other>[>=]|[-_]{3})"
)


def markdown_text(value: object) -> str:
    """
    Text for a cell, a paragraph, a heading or an item of a list in Markdown.

    Args:
        value (`object`): Of any origin and type; it is shown as `str` shows it, in one line.

    Returns:
        `str`: Markdown that is rendered as the text, without links, images, HTML, emphasis, code or further cells.
    """
    text = visible(" ".join(str(value).split()))
    text = _SPECIAL.sub(lambda found: found["interval"] or f"\\{found[0]}", text)
    return _BEGINNING.sub(_escape_beginning, text, count=1) if _BEGINNING.match(text) else text


def _escape_beginning(found: re.Match) -> str:
    if found["number"]:
        return f"{found['number']}\\{found['end']}"
    return f"\\{found[0]}"
