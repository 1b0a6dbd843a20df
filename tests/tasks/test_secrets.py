"""Secrets that a server quotes do not pass; what is none stays."""

import pytest

from tasks.secrets import quoted, without_secrets


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("wrong key vllm-key-0123456789.", "wrong key [OPENAI_API_KEY]."),
        ("no answer from http://me:pa55word@host:8000/v1", "no answer from http://[user]@host:8000/v1"),
        ("ask http://host:8000/v1 again, or mail me@host", "ask http://host:8000/v1 again, or mail me@host"),
    ],
)
def test_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "vllm-key-0123456789")
    assert quoted(said, 100) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "404, url='https://b.s3.amazonaws.com/p/a.png?X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA%2F2026&X-Amz-Date=1"
            "&X-Amz-Security-Token=IQoJ%3D&X-Amz-Signature=0af3'",
            "404, url='https://b.s3.amazonaws.com/p/a.png?X-Amz-Algorithm=AWS4&X-Amz-Credential=[signature]&X-Amz-Date=1"
            "&X-Amz-Security-Token=[signature]&X-Amz-Signature=[signature]'",
        ),
        (
            "http://s3:8333/b/a.png?AWSAccessKeyId=AK&Signature=x%2By&Expires=9 gave 403",
            "http://s3:8333/b/a.png?AWSAccessKeyId=[signature]&Signature=[signature]&Expires=9 gave 403",
        ),
        ("a signature of the director", "a signature of the director"),
    ],
)
def test_what_opens_an_address_is_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
