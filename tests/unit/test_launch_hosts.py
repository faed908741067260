"""Hostfiles, filters, and where the processes go (Y3)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import devices
from launch.devices import place, visible_gpus
from launch.hosts import apply_filters, filter_text, read_hostfile
from rlhf.config.schema import LaunchConfig
from rlhf.errors import ConfigError, RequirementError


def hostfile(directory: Path, text: str) -> str:
    path = directory / "hosts"
    path.write_text(text)
    return str(path)


def test_a_hostfile(tmp_path: Path) -> None:
    """Y3: `host slots=N`, comments and empty lines."""
    text = "# cluster\nworker-0 slots=8\n\nworker-1   slots = 4  # half of it\n10.0.0.3\tslots=1\n"
    assert read_hostfile(hostfile(tmp_path, text)) == {"worker-0": 8, "worker-1": 4, "10.0.0.3": 1}


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    """Y3: deepspeed would run on this machine alone without a word."""
    with pytest.raises(RequirementError, match="cannot be read"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=1\nb 8\n", "hosts:2: 'b 8' cannot be understood"),
        ("a slots=1\nb slots=x", "hosts:2"),
        ("a slots=1\nb slots=2 c slots=1", "hosts:2"),
        ("a slots=1\n\na slots=2", "hosts:3: host 'a' was already given in line 1"),
        ("a slots=0", "hosts:1: host 'a' has slots=0"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_says_where(tmp_path: Path, text: str, said: str) -> None:
    """Y3."""
    with pytest.raises(ConfigError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert said in str(caught.value)


HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1]}


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, HOSTS),
        ("a", None, {"a": [0, 1, 2, 3]}),
        ("b@a:2,0", None, {"a": [0, 2], "b": [0, 1]}),
        (None, "a:1", {"a": [0, 2, 3], "b": [0, 1]}),
        (None, "b", {"a": [0, 1, 2, 3]}),
        (None, "b:0,1@a:0", {"a": [1, 2, 3]}),
    ],
)
def test_filters(include: str | None, exclude: str | None, left: dict[str, list[int]]) -> None:
    """Y3: `host:0,1@other`; the hostfile's order stays."""
    found = apply_filters(HOSTS, include, exclude)
    assert found == left
    assert list(found) == [host for host in HOSTS if host in left]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c", "no host 'c'; there is a, b"),
        ("b:2", "host 'b' has no device 2; it has 0, 1"),
        ("a:x", "'a:x' cannot be understood"),
        ("a:", "cannot be understood"),
        ("a@a", "named twice"),
        ("a@", "'' cannot be understood"),
    ],
)
def test_a_bad_filter(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_filters(HOSTS, text)
    assert said in str(caught.value)


def test_a_filter_that_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="leaves no device"):
        apply_filters(HOSTS, None, "a@b")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 7), min_size=1), min_size=1))
def test_include_and_exclude_share_the_devices_out(chosen: dict[str, set[int]]) -> None:
    """What is included and what excluding it leaves make the whole; the text form names it."""
    hosts = {host: list(range(8)) for host in "abc"}
    text = filter_text({host: sorted(slots) for host, slots in chosen.items()})
    included = apply_filters(hosts, text)
    assert included == {host: sorted(chosen[host]) for host in "abc" if host in chosen}
    if all(len(slots) == 8 for slots in chosen.values()) and len(chosen) == 3:
        return
    excluded = apply_filters(hosts, None, text)
    for host in "abc":
        assert sorted(included.get(host, []) + excluded.get(host, [])) == list(range(8))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def install(count: int) -> None:
        monkeypatch.setattr(devices, "_installed_gpus", lambda: count)

    return install


@pytest.mark.parametrize(
    ("installed", "environ", "names"),
    [
        (4, {}, ["0", "1", "2", "3"]),
        (4, {"CUDA_VISIBLE_DEVICES": "2, 3"}, ["2", "3"]),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (4, {"CUDA_VISIBLE_DEVICES": "1,9,2"}, ["1"]),
        (4, {"CUDA_VISIBLE_DEVICES": "GPU-aaa,GPU-bbb"}, ["GPU-aaa", "GPU-bbb"]),
        (4, {"DS_ACCELERATOR": "cpu"}, []),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, []),
    ],
)
def test_visible_devices(gpus, installed: int, environ: dict[str, str], names: list[str]) -> None:
    """Y3: CUDA_VISIBLE_DEVICES is honoured, read as CUDA reads it."""
    gpus(installed)
    assert visible_gpus(environ) == names


def test_devices_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of nvidia-smi; MIG lines below a GPU are not GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_gpus({}) == ["0", "1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus({}) == []


def test_on_cpu_one_process_unless_asked(gpus) -> None:
    gpus(0)
    assert place(LaunchConfig(), {}).world_size == 1
    assert place(LaunchConfig(deployment_type="single_node"), {}).world_size == 1
    two = place(LaunchConfig(deployment_type="single_node", num_gpus=2), {})
    assert (two.world_size, two.accelerator, two.any_devices) == (2, "cpu", True)


def test_on_gpus(gpus) -> None:
    gpus(4)
    assert place(LaunchConfig(), {}).world_size == 1
    assert place(LaunchConfig(deployment_type="single_node"), {}).world_size == 4
    some = place(
        LaunchConfig(deployment_type="single_node", num_gpus=1), {"CUDA_VISIBLE_DEVICES": "3,1"}
    )
    assert (some.hosts, some.any_devices) == ({"localhost": [3]}, False)
    listed = place(LaunchConfig(deployment_type="single_node", include="localhost:1,3"), {})
    assert (listed.hosts, listed.any_devices) == ({"localhost": [1, 3]}, False)
    with pytest.raises(RequirementError, match=r"--num-gpus 5: only 4 GPU\(s\) are visible"):
        place(LaunchConfig(deployment_type="single_node", num_gpus=5), {})


def test_uuids_go_with_torchrun_only(gpus) -> None:
    gpus(2)
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-aaa,GPU-bbb"}
    with pytest.raises(ConfigError, match="use --launcher torchrun"):
        place(LaunchConfig(deployment_type="single_node"), environ)
    config = LaunchConfig(deployment_type="single_node", launcher="torchrun")
    assert place(config, environ).world_size == 2


def test_many_nodes(tmp_path: Path) -> None:
    """C7: hostfile, filters, num-nodes and num-gpus together."""
    hosts = hostfile(tmp_path, "a slots=4\nb slots=4\nc slots=4\n")
    config = LaunchConfig(
        deployment_type="multi_node", hostfile=hosts, exclude="a:0", num_nodes=2, num_gpus=2
    )
    found = place(config)
    assert found.hosts == {"a": [1, 2], "b": [0, 1]}
    assert (found.world_size, found.multi_node, found.master_port) == (4, True, 29500)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hostfile": None}, "give --hostfile"),
        ({"num_nodes": 3}, "--num-nodes 3: the hostfile and filters leave 2 host"),
        ({"num_gpus": 9}, "host 'a' has 2 slots"),
        ({"node_rank": 2, "master_addr": "a"}, "the ranks of 2 nodes end at 1"),
        ({"node_rank": 1}, "need --master-addr"),
    ],
)
def test_many_nodes_misused(tmp_path: Path, changes: dict, said: str) -> None:
    hosts = hostfile(tmp_path, "a slots=2\nb slots=2\n")
    config = LaunchConfig(**{"deployment_type": "multi_node", "hostfile": hosts, **changes})
    with pytest.raises(ConfigError) as caught:
        place(config)
    assert said in str(caught.value)
