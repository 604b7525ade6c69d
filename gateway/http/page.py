"""The chat page at `/`: one file, sent with a policy that lets nothing run but what is in it. Knows no model."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.responses import Response


def page_response() -> Response:
    """The page and its headers; no other host, no other script or style, no frame around it."""
    return Response(
        _PAGE,
        media_type="text/html",
        headers={
            "content-security-policy": _POLICY,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        },
    )


def content_security_policy(page: str) -> str:
    """Allows exactly the inline script and style of `page`, by their digests, and requests to its own origin."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(page, 'script')}",
            f"style-src {_digest(page, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def _digest(page: str, tag: str) -> str:
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_PAGE = files("gateway.http").joinpath("page.html").read_text(encoding="utf-8")
_POLICY = content_security_policy(_PAGE)
