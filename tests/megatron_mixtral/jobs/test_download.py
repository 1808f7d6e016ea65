"""`download` against a hub on this machine: real HTTP, the real client."""

import json
import subprocess
import sys

import pytest
from fake_hub import serving

from megatron_mixtral.jobs.tiny import make
from megatron_mixtral.spec.jobs import TinyConfig


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = make(
        TinyConfig(
            output=str(tmp_path_factory.mktemp("repo") / "m"), layers=1, hidden=512, intermediate=16, heads=2
        )
    )
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return files | {"consolidated.00.pt": b"pickle", "README.md": b"words"}


@pytest.fixture
def hub(repository):
    with serving(dict(repository)) as server:
        yield server


def download(server, tmp_path, **config):
    """Run the job as a script does, on its own: (exit code, what it said)."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    config = {"repo": "owner/model", "output": str(tmp_path / "out"), **config}
    (run / "config.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mixtral", "download", "--config", str(run / "config.yaml")],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "3",
            "HF_ENDPOINT": server.url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_everything_but_pickles_comes_and_a_second_time_nothing_is_fetched(hub, repository, tmp_path):
    assert download(hub, tmp_path)[0] == 0
    got = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert {n: d for n, d in got.items() if n != ".gitignore"} == {
        n: d for n, d in repository.items() if n != "consolidated.00.pt"
    }
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["done"] == events[-1]["total"] > 0
    hub.ranges.clear()
    assert download(hub, tmp_path)[0] == 0
    assert hub.ranges == []


def test_a_broken_connection_goes_on_at_the_byte_where_it_broke(hub, repository, tmp_path):
    weights = "model-00002-of-00002.safetensors"
    hub.cut = {weights: (20 << 20, 1)}
    assert download(hub, tmp_path)[0] == 0
    assert (tmp_path / "out" / weights).read_bytes() == repository[weights]
    assert [start > 0 for name, start in hub.ranges if name == weights and start] == [True], hub.ranges


def test_a_failed_download_leaves_no_half_file_and_the_next_one_fetches_only_what_is_missing(hub, tmp_path):
    weights = "model-00002-of-00002.safetensors"
    hub.cut = {weights: (100, 99)}
    code, said = download(hub, tmp_path)
    assert code == 1
    assert "download again to resume" in said
    assert not (tmp_path / "out" / weights).exists()
    hub.cut = {}
    hub.ranges.clear()
    assert download(hub, tmp_path)[0] == 0
    assert {name for name, _ in hub.ranges} == {weights}


def test_a_gated_repository_is_answered_with_what_to_do(hub, tmp_path):
    hub.refuse = (403, "GatedRepo", "Access to model owner/model is restricted")
    code, said = download(hub, tmp_path)
    assert code == 2
    assert "accept its conditions" in said
    assert "HF_TOKEN" in said
    assert "/owner/model" in said


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"repo": "owner/other"}, "owner/other: not found"),
        ({"revision": "none"}, "has no revision 'none'"),
        ({"repo": "a/b/c"}, "owner/name"),
    ],
)
def test_a_wrong_name_is_the_users_mistake(hub, tmp_path, config, words):
    code, said = download(hub, tmp_path, **config)
    assert code == 2
    assert words in said
    assert not (tmp_path / "out").exists()


def test_no_connection_is_a_fault_that_says_so(tmp_path, hub):
    hub.shutdown()
    hub.server_close()
    code, said = download(hub, tmp_path)
    assert code == 1
    assert "login node" in said


def test_weights_in_pickles_alone_are_refused(tmp_path):
    with serving({"config.json": b"{}", "pytorch_model.bin": b"x"}) as server:
        code, said = download(server, tmp_path)
    assert code == 2
    assert "has no *.safetensors" in said


def test_a_folder_with_something_else_is_left_alone(hub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, said = download(hub, tmp_path)
    assert code == 2
    assert "holds something else" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_it_needs_no_torch():
    code = "import megatron_mixtral.jobs.download, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
