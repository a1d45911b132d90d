"""The page at `/` that talks to the server it comes from: one file, which asks nobody else for anything.

It holds no secret, so it needs no key; what it asks the server for does. The browser runs only the script whose hash
the policy names, and refuses to make markup out of text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response

PATH = "/"


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """(the page, its headers)."""
    text = files("muster.serve").joinpath("playground.html").read_text("utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hash_of(text, 'script')}",
        f"style-src {_hash_of(text, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hash_of(text: str, tag: str) -> str:
    """The one element's content, as a policy names it (CSP level 3)."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def playground() -> Response:
    """The page as an answer."""
    content, headers = _page()
    return Response(content, media_type="text/html", headers=headers)
