"""What counts as a secret: names of variables, and forms of tokens. The one list, for what is taken
out of text (rlhf/redact.py) and for what is never passed on unasked (launch/forward.py).

The forms are the issuers' own, as documented and as scanners (gitleaks, detect-secrets) look for
them. Pure; imports nothing of ours.
"""

from __future__ import annotations

import base64
import binascii
import re

_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|WEBHOOK"
    r"|(?:API|ACCESS|PRIVATE|AUTH|ACCOUNT|STORAGE)_?KEY|(?:^|_)KEY(?:S|_ID)?$|(?:^|_)PAT$|_PWD$"
    r"|(?:^|_)DSN$|^NETRC$",
    re.IGNORECASE,
)
# beginning (which a stream holds back) -> the rest of the token
_FORMS = {
    "hf_": r"(?:[A-Za-z0-9]{20,}|(?:jwt|oauth)_[\w.-]{20,})",
    "ghp_": r"[A-Za-z0-9]{20,}",
    "gho_": r"[A-Za-z0-9]{20,}",
    "ghu_": r"[A-Za-z0-9]{20,}",
    "ghs_": r"[A-Za-z0-9]{20,}",
    "ghr_": r"[A-Za-z0-9]{20,}",
    "github_pat_": r"\w{20,}",
    "glpat-": r"[\w-]{20,}",
    "sk-": r"[A-Za-z0-9][\w-]{19,}",
    "sk_live_": r"[A-Za-z0-9]{16,}",
    "xoxb-": r"[A-Za-z0-9-]{10,}",
    "xoxp-": r"[A-Za-z0-9-]{10,}",
    "xoxa-": r"[A-Za-z0-9-]{10,}",
    "xapp-": r"[A-Za-z0-9-]{10,}",
    "AKIA": r"[A-Z0-9]{16}",
    "ASIA": r"[A-Z0-9]{16}",
    "AIza": r"[\w-]{35}",
    "pypi-": r"[\w-]{50,}",
    "npm_": r"[A-Za-z0-9]{36}",
    "dckr_pat_": r"[\w-]{20,}",
    "eyJ": r"[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",  # JSON web token
}
STARTS = tuple(_FORMS)
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:" + "|".join(re.escape(s) + rest for s, rest in _FORMS.items()) + ")"
)
# A link whose path is the secret: who has it can post.
WEBHOOK = re.compile(
    r"(://(?:hooks\.slack\.com/(?:services|workflows|triggers)|[\w.]*discord(?:app)?\.com/api/webhooks"
    r"|[\w.-]+\.webhook\.office\.com/webhookb2|[\w.-]+\.logic\.azure\.com(?::\d+)?/workflows"
    r"|api\.telegram\.org))/[^\s\"'<>\\]+",
    re.IGNORECASE,
)
# What follows these words is a secret; a stream holds both back together.
LEADS = ("bearer", "basic", "authorization")
_BEARER = re.compile(r"(Bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_BASIC = re.compile(r"(Basic\s+)([A-Za-z0-9+/]{6,}={0,2})", re.IGNORECASE)
_HEADER = re.compile(
    r"(\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:(?:Bearer|Basic|Token|ApiKey)\s+)?)"
    r"(?!(?:Bearer|Basic|Token|ApiKey)\b)[^\s\"',<>]{8,}",
    re.IGNORECASE,
)


def sounds_secret(name: str) -> bool:
    """Is a variable of this name likely to hold a secret?"""
    return _NAME.search(name) is not None


def without_headers(text: str, mark: str) -> str:
    """`text` with `mark` for what an authorization header says."""
    lower = text.lower()
    if not any(lead in lower for lead in LEADS):
        return text
    text = _HEADER.sub(rf"\1{mark}", text)
    text = _BEARER.sub(rf"\1{mark}", text)
    return _BASIC.sub(lambda m: m[1] + (mark if _is_login(m[2]) else m[2]), text)


def _is_login(encoded: str) -> bool:
    """Is it "user:password" in base 64, rather than a word?"""
    try:
        return b":" in base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
