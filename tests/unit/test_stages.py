"""A kind of stage is a row: a fourth one is planned, gated, run, resumed and reported by the driver
without a line changed elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.options import parse_options
from rlhf import stages
from rlhf.config.step_args import step_config
from rlhf.errors import ConfigError
from rlhf.stages import DEFAULT_PIPELINE, PPO, REWARD, SFT, STAGES, Stage, chosen, pipeline_of
from rlhf.store import RunDir, read_manifest, verify
from tests.unit import driver_help
from tests.unit.driver_help import read
from tests.unit.test_driver_run import driver  # noqa: F401 - a fixture

ROW = """
from rlhf.stages import Need, Stage, register
register(Stage(
    name="critic", number=4, title="judge of answers", folder="step4_judge", makes="judge",
    rows="pairs", shares=(2,), section="step2", models=("step2",),
    batch="step2.train.batch_size", micro_batch="step2.train.micro_batch_size",
    zero_flag="--reward-zero-stage", needs=(Need("ppo"),), scalar=True, measured="accuracy",
    inherits={"step2.max_prompt_length": ("ppo", "step1.max_prompt_length"),
              "step2.max_length": ("ppo", "step1.max_length")},
))
"""
ALL = "pipeline=[sft,reward,ppo,critic]"


@pytest.fixture
def fourth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """The row, registered here and in the stage's own process, and its script."""
    exec(ROW, {})
    stage = STAGES.pop("critic")
    monkeypatch.setitem(STAGES, "critic", stage)  # until the test is over
    return stage


@pytest.fixture
def run(driver, fourth: Stage, tmp_path: Path):  # noqa: F811
    """The driver, with the fourth stage's script beside the others."""
    folder = tmp_path / "steps" / fourth.folder
    folder.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    script = driver_help.SCRIPT.format(root=root, dirs=driver_help.folders())
    imports, _, rest = script.partition("resolved = ")
    (folder / "main.py").write_text(f"{imports}{ROW}\nresolved = {rest}")
    return driver


def test_a_fourth_stage_is_planned_gated_run_and_reported(run, tmp_path: Path) -> None:
    code, _, err = run("--step", "4", ALL)
    assert code == 3
    assert "step 4 builds on step 3's PPO model" in err
    assert f"python train.py --step 3 '{ALL}'" in err
    code, out, err = run(ALL, "--dry-run")
    assert (code, err) == (0, "")
    assert "step 4   judge of answers: " in out
    assert "-> step4_judge/artifact" in out
    assert "step2.train.micro_batch_size" in out
    code, out, err = run(ALL)
    assert (code, err) == (0, "")
    assert "step 4 done: judge of answers artifact" in out
    assert "held-out accuracy 0.75" in out
    place = RunDir(tmp_path / "output" / "tiny_cpu")
    made = verify(place.artifact("judge"), "judge")
    assert made.parents["ppo"].id == read_manifest(place.artifact("ppo")).id
    assert place.artifact("judge") == tmp_path / "output/tiny_cpu/step4_judge/artifact"
    assert read(place.resolved("critic"))["stage"] == "critic"
    assert read(place.resolved("critic"))["config"]["step2"]["max_length"] == 128
    code, out, _ = run(ALL)
    assert code == 0
    assert out.count("already done") == 4
    told = step_config(["--config", str(place.resolved("critic"))], "critic")
    assert told.row is STAGES["critic"]
    with pytest.raises(ConfigError, match=r"is for step 4: give step 3's resolved\.json"):
        step_config(["--config", str(place.resolved("critic"))], "ppo")


def test_a_fourth_stage_goes_on_and_is_not_replaced_unasked(run, tmp_path: Path) -> None:
    assert run(ALL, "--step", "1", "2", "3")[0] == 0
    code, out, _ = run(ALL, "--step", "4", fake="save_and_fail", step=4)
    assert code == 1
    code, out, _ = run(ALL, "--step", "4")
    assert code == 0
    assert "goes on from step-00000007" in out
    shutil.rmtree(RunDir(tmp_path / "output/tiny_cpu").resume("critic"))  # as real stages do
    code, _, err = run(ALL, "step2.optim.learning_rate=0.5", "--step", "4")
    assert code == 2
    assert "step 4 is finished" in err
    assert "step2.optim.learning_rate" in err
    code, out, _ = run(ALL, "step3.ppo.kl_coef=0.3", "--step", "3", "--force")
    assert code == 0
    assert "step 4 (judge of answers artifact" in out
    assert "was made from it and no longer fits" in out


def test_a_pipeline_may_be_shorter(driver, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = driver("pipeline=[sft,reward]")
    assert code == 0
    assert "step 2 done" in out
    assert "step 3" not in out
    assert not (tmp_path / "output/tiny_cpu/step3_ppo").exists()
    code, _, err = driver("pipeline=[sft,reward]", "--step", "3")
    assert code == 2
    assert "--step 3: the pipeline has 1 SFT, 2 reward model" in err


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["sft", "dbo"], "no stage 'dbo': there are sft, reward, dpo, ppo"),
        (["reward", "sft"], r"reward \(2\), sft \(1\): name one stage or more, each number once"),
        (["sft", "sft"], "each number once"),
        ([], "pipeline: nothing"),
    ],
)
def test_what_is_no_pipeline(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pipeline_of(names)
    with pytest.raises(ConfigError):
        parse_options([f"pipeline={names}".replace("'", "")], {})


def test_which_stages_are_asked_for() -> None:
    whole = pipeline_of(DEFAULT_PIPELINE)
    assert whole == [SFT, REWARD, PPO] == chosen(whole, None)
    assert chosen(whole, [3, 1, 3]) == [SFT, PPO]
    assert parse_options([], {}).steps == [1, 2, 3]
    assert stages.get("reward") is stages.get(2) is stages.maker_of("reward") is REWARD


def test_two_rows_cannot_share_a_place(fourth: Stage) -> None:
    for change in ("name", "folder", "makes"):
        fields = vars(fourth) | {"name": "n", "folder": "f", "makes": "m"}
        with pytest.raises(ConfigError, match=f"the {change} "):
            stages.register(Stage(**fields | {change: getattr(fourth, change)}))
