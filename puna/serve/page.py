"""The chat page: one file, no network beyond this server, and a policy that holds the browser to it.

The Content-Security-Policy names the page's own style and script by their hashes. Whatever a model writes, the browser
runs no script but that one, and fetches nothing from elsewhere.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page's HTML, and the value of its Content-Security-Policy header."""

    html: str
    policy: str

    @classmethod
    def read(cls) -> "Page":
        """The page from the package."""
        html = resources.files("puna.serve").joinpath("page.html").read_text(encoding="utf-8")
        policy = {
            "default-src": "'none'",
            "script-src": _hashes(html, "script"),
            "style-src": _hashes(html, "style"),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        return cls(html=html, policy="; ".join(f"{name} {value}" for name, value in policy.items()))


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
