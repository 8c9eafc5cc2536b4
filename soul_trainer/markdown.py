"""Names and settings of any origin in a model card: each stays a span of code, and makes no markup."""

import re


_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def markdown_code(value: object) -> str:
    """
    A span of code in a cell, a paragraph or an item of a list.

    Args:
        value (`object`): Of any origin and type; it is shown as `str` shows it, in one line.

    Returns:
        `str`: Markdown. Backslashes do not escape in a span of code, and so its marks are longer than any in the text;
        a pipe alone is escaped, which tables read before they read code. Control characters are spelled out.
    """
    text = " ".join(str(value).split())
    text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    if not text:
        return ""
    text = text.replace("\\|", "\\ |")  # some renderers end the cell at an escaped backslash and a pipe
    marks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{marks}{space}{text}{space}{marks}".replace("|", "\\|")
