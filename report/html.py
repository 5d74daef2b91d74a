"""Pieces of HTML that a report is made of; every text that comes in is escaped here."""

from html import escape


def printable(text):
    """File names that are not UTF-8 come with lone surrogates, which no page takes; control characters are shown."""
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def text_of(value):
    return escape(printable(value))


def section(title, body):
    return f"<section>\n<h2>{text_of(title)}</h2>\n{body}\n</section>\n" if body else ""


def note(text):
    return f"<p class=note>{text_of(text)}</p>\n"


def table(head, rows, label="table"):
    """head: titles.  rows: of equally many cells, the first of which names the row."""
    titles = "".join(f"<th scope=col>{text_of(title)}</th>" for title in head)
    body = "".join(
        f"<tr><th scope=row>{text_of(name)}</th>{''.join(f'<td>{text_of(cell)}</td>' for cell in cells)}</tr>\n"
        for name, *cells in rows
    )
    return (
        f'<div class=wide tabindex=0 role=group aria-label="{text_of(label)}"><table><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def facts(pairs):
    """A list of names and what they are; without names that have None or nothing."""
    rows = "".join(
        f"<dt>{text_of(key)}</dt><dd>{text_of(value)}</dd>\n" for key, value in pairs if value not in (None, "")
    )
    return f"<dl>\n{rows}</dl>\n" if rows else ""
