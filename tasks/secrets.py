"""What the environment holds that nobody else may read, kept out of text that is stored or shown.

A server may quote what it was sent: a refusal that names the key, say, or an address with a password in it. Such text goes
into rollouts, errors and logs.
"""

import os
import re

_SECRET = (
    "OPENAI_API_KEY",
    "VLLM_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "DRAG_WEBHOOK_URL",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
)
_SHORTEST = 8  # a shorter value, such as EMPTY, guards nothing and may be a common word
_SIGNATURE = re.compile(  # of an address that whoever has it may use (presigned, S3)
    r"(?i)\b(X-Amz-(?:Signature|Security-Token|Credential)|Signature|AWSAccessKeyId)=[^&\s\"'<>\\)]+"
)
_USER = re.compile(r"(?<=://)[^/@\s\"'<>]+@")  # user and password of an address


def without_values(text: str) -> str:
    """The text with the name of the variable in place of each secret, and all else as it was: for what a model says."""
    values = {name: value for name in _SECRET if len(value := os.environ.get(name, "").strip()) >= _SHORTEST}
    for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"[{name}]")
    return text


def without_secrets(text: str) -> str:
    """The same, and no user, password or signature in an address: for what a program says.

    Call it before the text is cut.
    """
    return _SIGNATURE.sub(r"\1=[signature]", _USER.sub("[user]@", without_values(text)))


def quoted(text: str, most: int) -> str:
    """An error's text, to be stored and shown: without secrets, cut at `most`."""
    return without_secrets(text)[:most]
