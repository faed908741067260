"""Secrets are taken out of text, wherever a piece of output happens to end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.redact import (
    MARK,
    RedactedStream,
    first_redacted,
    hide,
    redact,
    redact_tree,
    reveal,
    secret_values,
)

ENV = {
    "HF_TOKEN": "hf_planted_here",
    "AWS_SECRET_ACCESS_KEY": "abc/def+gh12345",
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE7",
    "DB_PASSWORD": "correct horse battery",
    "SSH_KEY": "-----BEGIN KEY-----\nMIIEpAIBAAKCAQEA\n-----END KEY-----\n",
    "X_PASSPHRASE": "größerer Satz",
    "PGPASSWORD": "ordinary-words-1",
    "OPENAI_APIKEY": 'quo"ted\\back',
    "GITHUB_PAT": "pat-of-mine-99",
    "SORT_KEY": "prompt",  # short: an ordinary word, which must stay readable
    "MONKEY": "a plain value",
    "KEYBOARD": "another plain value",
}
SIGNED = "https://bucket.s3.amazonaws.com/d/x.jsonl?X-Amz-Date=2026&X-Amz-Signature=5eC7e7"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_planted_here.", f"token {MARK}."),
        ("key=abc/def+gh12345;", f"key={MARK};"),
        ("as a URL has it: abc%2Fdef%2Bgh12345", f"as a URL has it: {MARK}"),
        ("AKIAEXAMPLE7", MARK),
        ("say correct horse battery staple", f"say {MARK} staple"),
        ("  MIIEpAIBAAKCAQEA", f"  {MARK}"),
        ("a token of another's: hf_" + "aB3" * 11, f"a token of another's: {MARK}"),
        ("Authorization: Bearer eyJhbGciOi.J9", f"Authorization: Bearer {MARK}"),
        ("https://me:pass@host/x", f"https://{MARK}@host/x"),
        ("s3://me:pass@host/x", f"s3://{MARK}@host/x"),
        (SIGNED, f"https://bucket.s3.amazonaws.com/d/x.jsonl?{MARK}"),
        (f"('{SIGNED}', 403)", f"('https://bucket.s3.amazonaws.com/d/x.jsonl?{MARK}', 403)"),
        (f'"{SIGNED}\\n"', f'"https://bucket.s3.amazonaws.com/d/x.jsonl?{MARK}\\n"'),
        ("https://h/x?page=1&sig=ab%2Bc#top", f"https://h/x?{MARK}#top"),
        ("https://h/x?access_token=abc", f"https://h/x?{MARK}"),
        ('"GET /x?n=1&sig=abc HTTP/1.1"', f'"GET /x?n=1&sig={MARK} HTTP/1.1"'),
        ("PGPASSWORD ordinary-words-1", f"PGPASSWORD {MARK}"),
        ('{"k": "quo\\"ted\\\\back"}', f'{{"k": "{MARK}"}}'),
        ('{"k": "gr\\u00f6\\u00dferer Satz"}', f'{{"k": "{MARK}"}}'),
        ("pat-of-mine-99", MARK),
        ("another's: ghp_" + "aB3" * 12, f"another's: {MARK}"),
        ("github_pat_" + "aB3" * 12, MARK),
        ("key sk-proj-" + "aB3_" * 12 + ", ok", f"key {MARK}, ok"),
        ("sk-ant-api03-" + "aB3" * 12, MARK),
        ("xoxb-123456789012-abcdef", MARK),
        ("AKIA" + "A1B2" * 4, MARK),
        ("AIza" + "x" * 35, MARK),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl", MARK),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", f"Authorization: Basic {MARK}"),
        ("Basic dXNlcjpwYXNzd29yZA==", f"Basic {MARK}"),
        ('"Authorization": "token 0123456789abcdef"', f'"Authorization": "token {MARK}"'),
        ("authorization=0123456789abcdef", f"authorization={MARK}"),
        (
            "https://hooks.slack.com/services/T0/B0/abcdefgh",
            f"https://hooks.slack.com/services/{MARK}",
        ),
        (
            "https://discord.com/api/webhooks/12/abc-def",
            f"https://discord.com/api/webhooks/{MARK}",
        ),
        # what is no secret stays
        ("Basic understanding of tokens", "Basic understanding of tokens"),
        ("task-force, disk-usage-of-this-machine", "task-force, disk-usage-of-this-machine"),
        ("eyJ", "eyJ"),
        ("authorization: none", "authorization: none"),
        ("prompt", "prompt"),
        ("a plain value, another plain value", "a plain value, another plain value"),
        ("https://h/x?page=2&tokens_per_second=3", "https://h/x?page=2&tokens_per_second=3"),
        ("hf_device_map, hf_quantizer", "hf_device_map, hf_quantizer"),
        ("loss=0.25 token=3", "loss=0.25 token=3"),
        ("me@host", "me@host"),
        ("abfs://box@acc.dfs.core.windows.net/x", "abfs://box@acc.dfs.core.windows.net/x"),
        ("abfss://me:pass@host/x", f"abfss://{MARK}@host/x"),
        ("https://box@acc.net/x", f"https://{MARK}@acc.net/x"),
    ],
)
def test_what_is_taken_out(text: str, shown: str) -> None:
    """Issue 5, security: tokens, keys, signed links and passwords, and nothing else."""
    assert redact(text, ENV) == shown
    assert redact(shown, ENV) == shown


def test_only_variables_named_like_secrets_count() -> None:
    found = secret_values(ENV)
    assert "prompt" not in found
    assert not any("plain" in value for value in found)
    assert found == tuple(sorted(found, key=lambda v: (-len(v), v))), "longest first"
    assert secret_values({"A_TOKEN": " padded12 \n"}) == ("padded12",)


def test_trees() -> None:
    tree = {"a": [SIGNED, 1, None], "b": {"c": ("x", "hf_planted_here")}, "d": 2.5}
    shown = redact_tree(tree, ENV)
    assert shown == {"a": [redact(SIGNED, ENV), 1, None], "b": {"c": ["x", MARK]}, "d": 2.5}
    assert tree["a"][0] == SIGNED, "the original is left alone"


def test_hidden_settings_come_back() -> None:
    """resolved.json is what a step reads: the secrets that it lacks travel beside it."""
    tree = {"config": {"data": {"path": ["a.jsonl", SIGNED]}, "seed": 1}, "run_dir": "/x"}
    shown, hidden = hide(tree, ENV)
    assert "5eC7e7" not in str(shown)
    assert hidden == {"config.data.path": ["a.jsonl", SIGNED]}
    assert first_redacted(shown) == "config.data.path"
    assert reveal(shown, hidden) == tree
    assert first_redacted(tree) is None
    assert hide({"config": {"seed": 1}}, ENV) == ({"config": {"seed": 1}}, {})


SECRETS = list(secret_values(ENV))
PIECES = st.sampled_from(
    [
        *SECRETS,
        SIGNED,
        "https://u:pw@h/",
        "/x?sig=abc&b=1",
        "Bearer abcdefgh1",
        "Basic dXNlcjpwYXNzd29yZA==",
        "ghp_" + "aB3" * 12,
        "sk-" + "aB3" * 12,
        " ",
        "\n",
        "\r",
        "hf_",
        "://",
        "word",
        "é",
        "\N{CJK UNIFIED IDEOGRAPH-4E2D}",
        "50%",
        "?",
        "correct horse",
        "abc/",
    ]
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(PIECES, max_size=12), data=st.data())
@example(parts=["correct horse battery"], data=None)
def test_a_stream_in_any_pieces_shows_no_secret(parts: list[str], data) -> None:
    """Wherever reads happen to end: in a token, in a URL, in the middle of a character; and for
    words with blanks between them the result is that of the whole text."""
    for text in ("".join(parts), "\n".join(parts)):
        got = in_pieces(text.encode(), data)
        for secret in (*SECRETS, "5eC7e7"):
            assert secret.encode() not in got
    assert got == redact(text, ENV).encode()


def in_pieces(raw: bytes, data) -> bytes:
    if data is None:
        cuts = list(range(len(raw) + 1))
    else:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    stream = RedactedStream(ENV)
    ends = [0, *cuts, len(raw)]
    got = b"".join(stream.feed(raw[a:b]) for a, b in itertools.pairwise(ends))
    return got + stream.end()


def test_ordinary_output_is_not_held_back() -> None:
    """A progress line shows at once, and bytes that are no text pass unchanged."""
    stream = RedactedStream(ENV)
    for piece in (b"\r 10%|#  | 3/30 [00:02", b"Loading weights", b"\xff\xfe\x80 ", b"loss=1.25"):
        assert stream.feed(piece) == piece
    assert stream.end() == b""


def test_output_without_a_blank_is_not_collected_for_ever() -> None:
    stream = RedactedStream({})
    total = sum(len(stream.feed(b"https://" + b"x" * 50_000)) for _ in range(20))
    assert total > 800_000
