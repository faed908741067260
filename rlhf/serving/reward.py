"""`rlhf serve-reward MODEL`: a reward model over HTTP, in the shape of OpenRLHF's servers.

    POST /get_reward {"query": [prompt + answer, ...], "prompts": [...]} -> {"rewards": [...]}
    GET /health -> {"model": ...}

`prompts` may be left out; then a query is read as one text. `ended` (a list of booleans) says which
answers stopped by themselves: the others are scored without EOS. Other keys are ignored.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf.errors import RequirementError, UserError

LARGEST_BODY = 256 * 10**6  # bytes
Scores = Callable[[list[str], list[str], list[bool]], list[float]]


class BadRequest(Exception):
    """What was asked cannot be answered; its text says why."""


def parser() -> argparse.ArgumentParser:
    """The flags with their help."""
    made = argparse.ArgumentParser(
        prog="rlhf serve-reward",
        allow_abbrev=False,
        description="Serves a reward model over HTTP: POST /get_reward, as OpenRLHF asks. It asks "
        "for no password: whoever reaches the port can use it.",
    )
    add = made.add_argument
    add("model", metavar="MODEL", help="a run, an artifact, a Hugging Face directory, or a hub id")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: all (default: %(default)s)",
    )
    add("--port", type=int, default=5000, help="0: a free one (default: %(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="rows of one forward pass")
    add("--raw", action="store_true", help="the model's own numbers; else (score - mean) / std "
        "with the artifact's statistics, as in step 3")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    try:
        if flags.batch_size < 1:
            raise RequirementError(f"--batch-size {flags.batch_size}: must be 1 or more")
        serve(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def serve(flags: argparse.Namespace) -> None:
    """Loads the model and answers until the process is told to stop."""
    from rlhf.serving.scorer import Scorer, Unreadable, find_model  # torch: not for --help

    place = find_model(flags.model)
    scorer = Scorer(place, batch_size=flags.batch_size, normalised=not flags.raw)

    def scores(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
        try:
            return scorer.scores(prompts, answers, ended)
        except Unreadable as error:
            raise BadRequest(str(error)) from None

    with open_server(flags.host, flags.port, place, scores) as server:
        host, port = server.server_address[:2]
        print(f"{place}: http://{host!s}:{port}/get_reward", flush=True)
        server.serve_forever()


def open_server(host: str, port: int, name: str, scores: Scores) -> ThreadingHTTPServer:
    """Listens; one request at a time is scored. Raises RequirementError: the port is taken."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/health"
            self._say(200 if known else 404, {"model": name} if known else _UNKNOWN)

        def do_POST(self) -> None:
            if self.path.rstrip("/") != "/get_reward":
                self._say(404, _UNKNOWN)
                return
            try:
                given = rows_of(self._body())
                with turn:
                    self._say(200, {"rewards": scores(*given)})
            except BadRequest as error:
                self._say(400, {"error": str(error)})
            except Exception as error:  # noqa: BLE001 - one request's fault; the server stays
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self._say(500, {"error": f"{type(error).__name__}: {error}"})

        def _body(self) -> Any:
            try:
                length = int(self.headers.get("Content-Length") or "")
            except ValueError:
                raise BadRequest("Content-Length is missing") from None
            if not 0 <= length <= LARGEST_BODY:
                raise BadRequest(
                    f"the body is larger than {LARGEST_BODY} bytes: send fewer at once"
                )
            try:
                return json.loads(self.rfile.read(length))
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"the body is no JSON: {error}") from None

        def _say(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Requests are not written down: prompts may be private."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise RequirementError(
            f"cannot listen at {host}:{port}: {error}: choose another --port"
        ) from None


_UNKNOWN = {"error": "there are POST /get_reward and GET /health"}


def rows_of(content: Any) -> tuple[list[str], list[str], list[bool]]:
    """(prompts, answers, ended) of a request. Raises BadRequest."""
    queries: Any = content.get("query") if isinstance(content, dict) else None
    if not _texts(queries):
        raise BadRequest('"query" must be a list of texts: prompt and answer together')
    prompts = content.get("prompts")
    if prompts is None:
        prompts = [""] * len(queries)
    if not _texts(prompts) or len(prompts) != len(queries):
        raise BadRequest('"prompts" must be a list of as many texts as "query"')
    for number, (prompt, query) in enumerate(zip(prompts, queries, strict=True)):
        if not query.startswith(prompt):
            raise BadRequest(f"query {number} does not begin with its prompt")
    ended = content.get("ended")
    if ended is None:
        ended = [True] * len(queries)
    if not isinstance(ended, list) or [type(one) for one in ended] != [bool] * len(queries):
        raise BadRequest('"ended" must be a list of as many booleans as "query"')
    answers = [query[len(prompt) :] for prompt, query in zip(prompts, queries, strict=True)]
    return prompts, answers, ended


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


if __name__ == "__main__":
    sys.exit(main())
