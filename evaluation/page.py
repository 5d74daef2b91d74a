"""What HTML pages share: one file each, and nothing in it comes from or leads outside."""

import base64
import hashlib
import io
from html import escape

SMALL = 32  # px; up to this side PNG is as small as JPEG, and exact

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #595959; --line: #d0d0d0; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --soft: #b0b0b0; --line: #444444; --paper: #161616; } }
@media print { :root { --text: #000000; --soft: #333333; --line: #999999; --paper: #ffffff; } nav { display: none; } }
body { margin: 0 auto; max-width: 84rem; padding: 1rem 1.5rem; background: var(--paper); color: var(--text);
       font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .4rem; }
h2 span { font-weight: normal; color: var(--soft); }
a { color: inherit; }
"""


def html_page(title, header, main, style="", script="", refresh=None):
    """A whole page. title: text, escaped here.  header, main: HTML; the caller has escaped what is from outside.
    style: CSS beside `STYLE`.  script: the page's only script, which the policy names by its hash: no other runs, and
    nothing is loaded that is not in the page itself.  refresh: seconds after which the browser reads the file again."""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{header}
</header>
<main>
{main}</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def inlined(image):
    """A PIL image as a data URL: PNG up to `SMALL` px, else JPEG."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
