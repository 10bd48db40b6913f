"""Secrets are left out of all that is written or printed: `redact(text)`, for anything `redact_all(value)`.

Hidden are the user and password of a URL, query values that sign or open it (X-Amz-Signature, sig, token, Expires,
...), and in a command its headers, password options, secret variables and tokens of known shape. Everything that a run
records goes through here: the writers of rows and settings, the log, the index, and every message of an AmclipError.
A record is therefore no source of a secret: a run that resumes takes it from its command line or `$VARIABLE` again.
"""

import re
from typing import Any

HIDDEN = "***"
"""What replaces a secret."""
_END = r"\s\"'\\<>|`{},&;#"
_SECRET_WORD = (
    r"token|signature|secret|passw|passphrase|pwd|credential|api[-_]?key|access[-_]?key|key[-_]?id|key[-_]?pair"
    r"|private[-_]?key|accessid|auth|session|jwt|hmac"
)
_QUERY_NAME = (
    rf"[\w.%-]*(?:{_SECRET_WORD})[\w.%-]*|x-(?:amz|goog|oss|ms|cos|obs)-[\w.%-]+|[\w.-]*sig|sas|key|policy"
    r"|expires?|expiry"
)
_PATTERNS = [
    (re.compile(pattern), shown)
    for pattern, shown in (
        (r"(?i)(\b(?!abfss?:)[a-z][a-z0-9+.-]*://)[^/?#\s\"'\\<>]+@", rf"\1{HIDDEN}@"),  # abfs://CONTAINER@ is a place
        (rf"(?i)([?&;#](?:amp;)?(?:{_QUERY_NAME})=)(?:(?!::)[^{_END}])+", rf"\1{HIDDEN}"),
        (r"(?i)([?&](?:amp;)?(?:se|st|ske|skt)=)\d{4}-\d\d[\w:%.-]*", rf"\1{HIDDEN}"),  # hours of an Azure signature
        (
            r"(?i)(\b(?:[\w-]*authorization|x-[\w-]*(?:key|token|auth|secret)[\w-]*|api-key|private-token|cookie)\s*:\s*)"
            r"[^\"'\\\n]+",
            rf"\1{HIDDEN}",
        ),
        (
            rf"(\b[A-Z0-9_]*(?:SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|APIKEY|CREDENTIAL|_SAS)[A-Z0-9_]*=[\"']?)"
            rf"[^{_END}]+",
            rf"\1{HIDDEN}",
        ),
        (
            r"(?i)(\s--?(?:[\w-]*(?:password|passwd|token|api-key|secret|access-key)|(?:proxy-)?user|oauth2-bearer)"
            rf"[ =]+[\"']?)[^{_END}]+",
            rf"\1{HIDDEN}",
        ),
        (rf"(\s-u ?[\"']?)[^{_END}:]+:[^{_END}]+", rf"\1{HIDDEN}"),
        (r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}", rf"\1{HIDDEN}"),
        (
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
            r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bsk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{35}|\bya29\.[\w.-]{20,}"
            r"|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+",
            HIDDEN,
        ),
    )
]


def redact(text: str) -> str:
    """The text with *** for its secrets. Text without any is returned as it is."""
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redact_all(value: Any) -> Any:
    """A value with all strings in its dicts, lists and tuples redacted; keys stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value
