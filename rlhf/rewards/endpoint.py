"""A reward that another process gives, over HTTP, in the shape of OpenRLHF's remote reward models.

Asked: POST {"query": [prompt + answer, ...], "prompts": [...], "answers": [...], "labels": [...]},
and a list for each column. Answered: {"rewards": [number, ...]}.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf.config.names import refuse_credentials
from rlhf.errors import ConfigError, RequirementError
from rlhf.rewards.functions import RewardFunction

PAUSE_SECONDS = 1.0  # before the first retry; twice as long before each further one
CONNECT_SECONDS = 10.0
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # the server may do better a moment later
_SHOWN = 300


def http_endpoint(
    url: str,
    batch_size: int = 64,
    seconds: float = 60.0,
    retries: int = 3,
    labels: str | None = None,
    token_env: str | None = None,
) -> RewardFunction:
    """The numbers that a server gives.

    batch_size: answers of one request. seconds: of one request. retries: of one request that cannot
    be sent, takes too long, or is answered by 408, 425, 429 or 5xx. labels: the column that is sent
    as `labels`. token_env: the environment variable that holds a bearer token.
    """
    server = _checked(url, batch_size, seconds, retries, token_env)

    def score(prompts: Sequence[str], answers: Sequence[str], **columns: Any) -> list[float]:
        found: list[float] = []
        content = {"prompts": prompts, "answers": answers, **columns}
        content["query"] = [p + a for p, a in zip(prompts, answers, strict=True)]
        if labels is not None:
            content["labels"] = columns[labels]
        for start in range(0, len(answers), batch_size):
            batch = {name: values[start : start + batch_size] for name, values in content.items()}
            found += server.rewards(batch)
        return found

    return RewardFunction("http", score, needs=(labels,) if labels else (), reach=server.reach)


class _Server:
    def __init__(self, url: str, seconds: float, retries: int, token_env: str | None) -> None:
        self._url, self._seconds, self._retries, self._token_env = url, seconds, retries, token_env

    def reach(self) -> None:
        """Raises RequirementError where nothing listens, or the token is not there."""
        self._headers()
        place = urlsplit(self._url)
        port = place.port or (443 if place.scheme == "https" else 80)
        try:
            socket.create_connection((place.hostname or "", port), CONNECT_SECONDS).close()
        except OSError as error:
            raise RequirementError(
                f"reward 'http': nothing answers at {place.hostname}:{port} ({error}): start the "
                "server, or correct the url"
            ) from None

    def rewards(self, batch: dict[str, Any]) -> list[float]:
        """One request, again where that may help. Raises RequirementError with what went wrong."""
        count, pause = len(batch["query"]), PAUSE_SECONDS
        body = json.dumps(batch).encode()
        for left in range(self._retries, -1, -1):
            request = urllib.request.Request(self._url, body, self._headers(), method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                    return self._read(answer.read(), count)
            except urllib.error.HTTPError as error:
                why = f"answered {error.code} {error.reason}: {_text(error.read())}"
                again = error.code in _AGAIN
            except (OSError, http.client.HTTPException) as error:
                said = getattr(error, "reason", error)
                why, again = f"gave no answer: {type(error).__name__}: {said}", True
            if not left or not again:
                tries = self._retries - left + 1
                raise RequirementError(f"{self._url} {why} (request {tries} of {tries})")
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _read(self, content: bytes, count: int) -> list[float]:
        try:
            found = json.loads(content)["rewards"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, list):
            raise RequirementError(
                f'{self._url} answered {_text(content)}, and must answer {{"rewards": [a number '
                "for each query]}"
            )
        if len(found) != count:
            raise RequirementError(f"{self._url} gave {len(found)} rewards for {count} queries")
        return found

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._token_env is not None:
            token = os.environ.get(self._token_env, "").strip()
            if not token:
                raise RequirementError(
                    f"reward 'http': the environment has no {self._token_env} (token_env)"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers


def _checked(
    url: str, batch_size: int, seconds: float, retries: int, token_env: str | None
) -> _Server:
    try:
        place = urlsplit(url)
        fine = place.scheme in ("http", "https") and bool(place.hostname)
        _ = place.port
    except (ValueError, AttributeError):
        fine = False
    if not fine:
        raise ConfigError(
            f"reward 'http': url {url!r} is none: e.g. http://localhost:5000/get_reward"
        )
    refuse_credentials(url, "reward 'http': url")
    for name, value, least in (("batch_size", batch_size, 1), ("retries", retries, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"reward 'http': {name} {value!r}: a whole number from {least} on")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(f"reward 'http': seconds {seconds!r}: must be greater than 0")
    return _Server(url, float(seconds), retries, token_env)


def _text(content: bytes) -> str:
    return repr(content.decode("utf-8", "replace").strip()[:_SHOWN])
