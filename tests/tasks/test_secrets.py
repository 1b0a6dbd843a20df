"""Secrets that a server quotes do not pass; what is none stays."""

import pytest

from tasks.secrets import quoted


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
