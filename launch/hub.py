"""Is the hub needed, and does it answer? Asked before torch is even loaded, with a short limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from launch.checks import Check, judge
from rlhf.config.hub_cache import cache_directory, is_cached
from rlhf.config.names import DEFAULT_ENDPOINT, hub_dataset, is_hub_model

TIMEOUT_SECONDS = 5.0


def needed(models: list[str], data: list[str]) -> list[tuple[str, str]]:
    """("models" | "datasets", id) of everything that comes from a hub, each once."""
    ids = [("models", name) for name in models if is_hub_model(name)]
    ids += [("datasets", repo) for name in data if (repo := hub_dataset(name))]
    return list(dict.fromkeys(ids))


def problem(endpoint: str, timeout: float = TIMEOUT_SECONDS) -> str | None:
    """Why the hub at `endpoint` cannot be used; None if it answers. Takes `timeout` at most."""
    answer: list[str | None] = []
    # A thread, since a name server that does not answer keeps to no timeout.
    asking = threading.Thread(target=lambda: answer.append(_ask(endpoint, timeout)), daemon=True)
    asking.start()
    asking.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} s"


def trouble_with(
    endpoint: str, kind: str, name: str, timeout: float = TIMEOUT_SECONDS
) -> str | None:
    """Why a model (`models`) or data set (`datasets`) cannot be had from the hub; None if it can.

    A token in the environment (HF_TOKEN) is shown to the hub that was asked for, and to no other.
    """
    answer: list[str | None] = []
    token = os.environ.get("HF_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    path = f"api/{kind}/{name}"
    asking = threading.Thread(
        target=lambda: answer.append(_ask(endpoint, timeout, path, headers)), daemon=True
    )
    asking.start()
    asking.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} s"


def _ask(
    endpoint: str,
    timeout: float,
    path: str = "api/models?limit=1",
    headers: Mapping[str, str] | None = None,
) -> str | None:
    import ssl  # these three cost a dry run more than they are worth to it
    import urllib.error
    import urllib.request

    # Unredirected: urllib would carry a token along to whatever host a redirect names.
    request = urllib.request.Request(f"{endpoint}/{path}", method="GET")
    for header, value in (headers or {}).items():
        request.add_unredirected_header(header, value)
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        refused = path.count("/") > 1 and error.code in (401, 403, 404)
        return f"it answers HTTP {error.code}" if error.code >= 500 or refused else None
    except urllib.error.URLError as error:
        # The clients bring their own certificates: what fails here may work there.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def check_hub(
    models: list[str], data: list[str], endpoint: str | None, offline: bool
) -> tuple[bool, list[Check]]:
    """(work offline, a check for each model and data set that comes from a hub).

    A blocked hub is found in seconds; left to the clients it takes half a minute for each file.
    """
    ids = needed(models, data)
    missing = [(kind, name) for kind, name in ids if not is_cached(kind, name)]
    address = endpoint or DEFAULT_ENDPOINT
    checks = [
        Check(f"hub: {name}", "ok", f"downloaded to {cache_directory()}")
        for kind, name in ids
        if (kind, name) not in missing
    ]
    if offline:
        return True, checks + [_offline(name) for _, name in missing]
    if not missing:
        trouble = problem(address) if ids else None
        if trouble is None:
            return False, checks
        names = ", ".join(name for _, name in ids)
        found = f"{address} is out of reach ({trouble}): using the downloaded {names}"
        return True, [Check("hub", "warn", found)]
    with ThreadPoolExecutor(max_workers=len(missing)) as pool:
        troubles = list(pool.map(lambda one: trouble_with(address, *one), missing))
    return False, checks + [
        judge(
            f"hub: {name}",
            trouble is None,
            f"answers at {address}" if trouble is None else f"{address} cannot give it: {trouble}",
            "it must come from the hub",
            "check its name, the network and the proxy, use a mirror (--hf-endpoint https://...), "
            "HF_TOKEN for a gated one, give a local directory, or take a model and data that need "
            "no hub (python train.py without flags)",
        )
        for (_, name), trouble in zip(missing, troubles, strict=True)
    ]


def _offline(name: str) -> Check:
    return Check(
        f"hub: {name}",
        "FAIL",
        f"offline, and it has not been downloaded to {cache_directory()}",
        "",
        "download it where there is a network (`hf download NAME`), or give a local directory",
    )
