"""`rlhf certify`, in short: it holds, it is quiet, it sees a planted bug."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.certify.check import Check
from rlhf.certify.exact import best_of_n
from rlhf.certify.problem import EOS, divergence, group_fixed_point, make_problem
from tests.certify.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_quick_certificate_holds() -> None:
    """The command itself, as JSON: nothing else on stdout, every bound kept."""
    done = run("train.py", "certify", "--quick", "--json", "--seed", "3")
    said = json.loads(done.stdout)
    assert [check for check in said["checks"] if not check["holds"]] == []
    assert (done.returncode, said["failed"], said["ranks"]) == (0, 0, 1)
    assert len(said["checks"]) > 30


@pytest.mark.parametrize("bug", ["kl_coefficient_halved", "stop_string_is_read"])
def test_a_planted_bug_is_seen(bug: str) -> None:
    """Two that are found early; all others: `python -m tests.certify.mutants`."""
    said = run("-m", "tests.certify.mutants", "--one", bug).stdout.splitlines()[-1]
    assert said.removeprefix("RESULT").strip()
    assert len(MUTANTS) >= 30


def test_a_failed_check_is_exit_code_1() -> None:
    code = (
        "import os, sys\n"
        "from rlhf.certify.check import Check\n"
        "import rlhf.certify.main as m, rlhf.certify.exact as e\n"
        "e.estimators = lambda: iter([Check('one', 1.0, 1.0), Check('two', 2.0, 1.0)])\n"
        "import rlhf.certify.run as r\n"
        "r.checks = lambda *a, **k: e.estimators()\n"
        "sys.exit(m.main([]))"
    )
    done = run("-c", code)
    assert done.returncode == 1
    *_, one, two, end = done.stdout.splitlines()  # libraries were imported before main, here
    assert (one, two) == ("ok   one: 1.00000, at most 1", "FAIL two: 2.00000, at most 1")
    assert end.startswith("2 checks, 1 FAILED")


def test_no_number_keeps_no_bound() -> None:
    assert not Check("x", math.nan, 1.0).holds


def test_the_problem_by_hand() -> None:
    """1 + 7 * 8 answers of at most two tokens; a reward beyond the clip; the penalty."""
    problem = make_problem(0)
    assert len(problem.answers) == 57
    assert problem.answers[0] == (EOS,)
    assert int(problem.ended.sum()) == 1 + 7
    raw = problem.raw.clone()
    raw[0, 0], raw[0, 1] = 0.7 + 1.5 * 9, 0.7 - 1.5
    found = type(problem)(**{**vars(problem), "raw": raw}).rewards
    assert found[0, 0].item() == 1.5  # ended, clipped
    ended = bool(problem.ended[1])
    assert found[0, 1].item() == pytest.approx(-1.0 - (0.0 if ended else 0.5))


def test_fixed_points_satisfy_their_own_equations() -> None:
    """The optimum has E[r] - beta KL above any neighbour's; GRPO's k2 point has, in each state,
    log pi - log ref - Q / beta' constant; with one token GRPO's is the optimum at beta'."""
    problem = make_problem(4, with_eos=False, prompts=1)
    reference = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    reference = reference.double()

    def goal(log_p: torch.Tensor) -> float:
        p = log_p.exp()
        return float((p * (problem.rewards - problem.beta * (log_p - reference))).sum())

    best = problem.optimum(reference)
    for seed in range(5):
        noise = 0.1 * torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
        assert goal((best + noise).log_softmax(1)) < goal(best)
    found = group_fixed_point(problem, reference, 4, "k2").view(8, 8)
    ref, beta = reference.view(8, 8), problem.beta * 4 / 3
    second, ref_second = found.log_softmax(1), ref.log_softmax(1)
    rewards = problem.rewards.view(8, 8)
    flat = second - ref_second - rewards / beta
    assert float((flat - flat[:, :1]).abs().max()) < 1e-9
    value = (second.exp() * rewards).sum(1)
    first = found.logsumexp(1) - ref.logsumexp(1) - value / beta
    assert float((first - first[0]).abs().max()) < 1e-9
    assert divergence(found.view(1, -1), best) > 0.01, "another point than the optimum"


def test_best_of_n_by_hand() -> None:
    """Two answers, the better with probability 1/4: best of 2 has it with 1 - (3/4)^2."""
    best = best_of_n(torch.tensor([0.75, 0.25]), torch.tensor([0.0, 1.0]), 2)
    assert best.tolist() == pytest.approx([0.5625, 0.4375])
