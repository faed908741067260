"""The pipeline's driver: SFT, reward model, PPO, in one command.

python train.py                                  # the embedded default, on CPU
python train.py --step 1 2 3 --actor-model 1.3b --reward-model 350m --deployment-type single_node
python train.py --dry-run                        # the plan and the exact command lines
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from launch import console, evaluation, execute, recover, seeds
from launch.checklist import Found, ask_all
from launch.commands import COMMANDS
from launch.finished import forced_notes, refuse_changed_data
from launch.looking import look_at_data
from launch.options import Options, parse_options
from launch.plan import Plan, describe, make_plan, plan_json
from launch.records import record_plan
from launch.requeue import requeue_own_job
from rlhf.config.show import config_yaml, json_schema
from rlhf.errors import UserError
from rlhf.home import ensure_home
from rlhf.redact import printable, redact, redact_tree


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a step failed, 2 bad usage, 3 something is missing, 129,
    130, 138 or 143 stopped by SIGHUP, SIGINT, SIGUSR1 or SIGTERM."""
    console.protect()
    previous = {number: signal.signal(number, _as_interrupt) for number in _stop_signals()}
    try:
        ensure_home(os.environ)
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stdout.flush()
        print(printable(redact(f"error: {error}")), file=sys.stderr)
        return error.exit_code
    except execute.Interrupted as error:
        return _interrupted(error.number, f": {error}")
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(argv: Sequence[str]) -> int:
    """Plan, check, then launch and verify each step asked for; or a subcommand."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    options = parse_options(argv)
    if options.seeds:
        return seeds.run_all(options, main)
    if options.print_config or options.json_schema:
        print(json_schema() if options.json_schema else redact(config_yaml(options.config)))
        return 0

    plan = make_plan(options)
    if not options.as_json:
        print(redact(describe(plan)), flush=True)
    found = ask_all(plan, "dry-run" if options.dry_run else "run")
    show_checks(options, plan, found)
    if found.error:
        raise found.error
    if options.dry_run:
        return 0
    grace = plan.config.launch.grace_seconds
    with execute.locked(plan.run.path, plan.role, grace) as lock:
        console.keep_log(plan.run.driver_log(plan.role))
        if not plan.role:
            record_plan(options, plan)
        run_steps(options, plan, found, lock)
    show_verdict(plan)
    return 0


def show_checks(options: Options, plan: Plan, found: Found) -> None:
    """Of a dry run all checks; before a run what is to be known, and that the others hold."""
    if options.as_json:
        checks = [vars(check) for check in found.checks]
        print(json.dumps(redact_tree({**plan_json(plan), "checks": checks}), indent=2))
        return
    for line in found.looked.files:
        print(redact(f"file     {line}"))
    for item in plan.steps:
        if lines := [] if item.done else found.looked.lines(item.step):
            print(redact("\n".join([f"rows     of step {item.step}", *lines])))
    for line in forced_notes(plan):
        print(redact(line))
    warned = [check for check in found.checks if check.state == "warn"]
    shown = found.checks if options.dry_run else warned
    for check in shown:
        print(redact(check.line()))
    holding = sum(check.state != "FAIL" for check in found.checks)
    print(f"checks   {holding} of {len(found.checks)} hold", flush=True)


def run_steps(options: Options, plan: Plan, found: Found, lock: int) -> None:
    """Each step is launched once its parents are proven, and proven before the next."""
    launched = False
    for item in plan.steps:
        if item.manifest is not None:
            if item.unevaluated:
                evaluation.make_up(plan, item, found.env, lock)
            continue
        item.resolved.data_sources = found.looked.sources
        if launched:  # hours may have gone by
            refuse_changed_data(plan, item, look_at_data(plan).sources)
        launched = True
        print(
            f"\nstep {item.step} of {options.steps}: DeepSpeed starts; its first line takes some "
            "seconds",
            flush=True,
        )
        manifest, outcome = recover.run_step(plan.run, item, found.env, lock)
        print(execute.describe_result(item, manifest, outcome), flush=True)
        if item.step == 3 and not plan.role:
            evaluation.confirm(plan.run, item, outcome)


def show_verdict(plan: Plan) -> None:
    """What came of it, for a person."""
    if any(item.step == 3 for item in plan.steps):
        print(evaluation.verdict_text(plan.run))
    print(f"\nThe run is in {plan.run.path}")


def _interrupted(number: int, why: str = "") -> int:
    """The exit code; a job of Slurm that is at the end of its time comes back."""
    print(f"interrupted{why}", file=sys.stderr, flush=True)
    if told := requeue_own_job(number, os.environ):
        print(told, file=sys.stderr, flush=True)
    return 128 + number


def _stop_signals() -> list[signal.Signals]:
    """Besides SIGINT. A signal that is ignored (nohup) stays ignored."""
    known = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
