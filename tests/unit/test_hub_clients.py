"""`transformers` and `datasets` read models and data from an endpoint and from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hubclient import (
    answer,
    client_env,
    outside_addresses,
    pair_rows,
    processes,
    run_python,
    write_pairs_jsonl,
    write_pairs_parquet,
    write_tiny_model,
)
from tests.hubstub import HubStub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStub]:
    root = tmp_path_factory.mktemp("repos")
    models = {"org/tiny": write_tiny_model(root / "tiny")}
    datasets = {
        "org/lines": write_pairs_jsonl(root / "lines"),
        "org/pairs": write_pairs_parquet(root / "pairs"),
    }
    with HubStub(models=models, datasets=datasets) as hub:
        yield hub


MODEL = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("org/tiny")
model = AutoModelForCausalLM.from_pretrained("org/tiny")
ids = tokenizer("Human: What is the capital of Peru?", return_tensors="pt")["input_ids"]
print(json.dumps({"text": tokenizer.decode(ids[0]), "logits": model(ids).logits[0, -1].tolist()}))
"""


def test_model_and_tokenizer_come_from_the_endpoint(hub: HubStub, tmp_path: Path) -> None:
    """C4: `from_pretrained` of a hub id; the model computes what the local directory's does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run_python(MODEL, client_env(tmp_path, hub.url))
    got = answer(done)
    assert got["text"] == "Human: What is the capital of Peru?"

    directory = hub.repos["models", "org/tiny"].root
    ids = AutoTokenizer.from_pretrained(directory)(got["text"], return_tensors="pt")["input_ids"]
    local = AutoModelForCausalLM.from_pretrained(directory)(ids).logits[0, -1]
    assert got["logits"] == pytest.approx(local.tolist(), abs=1e-6)
    assert hub.fetched("org/tiny") == set(hub.repos["models", "org/tiny"].files)
    assert outside_addresses(tmp_path) == set()
    assert "huggingface.co" not in done.stdout + done.stderr


ROWS = """
import json, sys
import datasets
datasets.config.USE_PARQUET_EXPORT = False
print(json.dumps({
    name: {split: list(rows) for split, rows in datasets.load_dataset(name).items()}
    for name in ("org/lines", "org/pairs")
}))
"""


def test_data_sets_come_from_the_endpoint(hub: HubStub, tmp_path: Path) -> None:
    """C4, C10: JSONL and parquet repositories, both with the splits that their file names say."""
    env = client_env(tmp_path, hub.url, HF_UPDATE_DOWNLOAD_COUNTS="0")
    rows = pair_rows(9)
    expected = {"train": rows[:6], "test": rows[6:]}
    assert answer(run_python(ROWS, env)) == {"org/lines": expected, "org/pairs": expected}
    assert outside_addresses(tmp_path) == set()
    assert hub.fetched("org/lines") == {"train.jsonl", "test.jsonl"}
    assert hub.fetched("org/pairs") >= {
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }


def test_data_sets_alone_would_look_past_the_endpoint(hub: HubStub, tmp_path: Path) -> None:
    """C4: why a mirror needs two more settings than HF_ENDPOINT.

    `datasets` counts downloads at s3.amazonaws.com unless HF_UPDATE_DOWNLOAD_COUNTS=0, and asks the
    host `datasets-server.MIRROR`, token included, unless USE_PARQUET_EXPORT is off in its config.
    """
    code = ROWS.replace("datasets.config.USE_PARQUET_EXPORT = False\n", "")
    answer(run_python(code, client_env(tmp_path, hub.url)))
    asked = processes(tmp_path)[0].looked_up - {"127.0.0.1"}
    if not asked:
        pytest.skip("this release of datasets keeps to HF_ENDPOINT: the two settings can go")
    assert asked <= {"s3.amazonaws.com", "datasets-server.127.0.0.1"}


OURS = """
import json, sys
from rlhf.config.schema import DataConfig
from rlhf.data.sources.hub import open_hub
from rlhf.errors import DataError

def outcome(path, **settings):
    try:
        parts = open_hub(path, DataConfig(**settings)).parts
    except DataError as error:
        return str(error)
    return {"eval" if part.held_out else "train": [row for _, row in part.rows()] for part in parts}

print(json.dumps([outcome(*args, **settings) for args, settings in json.loads(sys.argv[1])]))
"""


def open_hub(env: dict[str, str], *calls: tuple[str, dict[str, str]]) -> list:
    """What our hub source makes of each (path, data settings): its rows, or its error's text."""
    asked = json.dumps([[[path], settings] for path, settings in calls])
    return answer(run_python(OURS, env, asked))


def test_our_hub_source_reads_both_splits(hub: HubStub, tmp_path: Path) -> None:
    """C4, C10: `--data-path org/pairs`; nothing is asked of any host but the endpoint."""
    env = client_env(tmp_path, hub.url)
    rows = pair_rows(9)
    expected = {"train": rows[:6], "eval": rows[6:]}
    assert open_hub(env, ("org/pairs", {}), ("org/pairs@main", {})) == [expected, expected]
    assert outside_addresses(tmp_path) == set()


def test_our_hub_source_explains_what_is_not_there(hub: HubStub, tmp_path: Path) -> None:
    """C4: an absent repository, revision or split is named, with what to do about it."""
    env = client_env(tmp_path, hub.url)
    absent, revision, split = open_hub(
        env, ("org/absent", {}), ("org/pairs@v9", {}), ("org/pairs", {"hub_split": "training"})
    )
    assert "org/absent" in absent
    assert "--hf-endpoint" in absent
    assert "HF_TOKEN" in absent
    assert "v9" in revision
    assert "no split 'training'" in split
    assert "data.hub_split" in split
