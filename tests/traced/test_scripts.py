"""Scripts run as Python runs them: main module, words, path, stdin, exit code, traceback; and torchrec."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.file_calls import read_events
from support.job_scripts import clean_environment

from dlrm.traced.hooks import HOOKS

SUPPORT = Path(__file__).parents[1] / "support"
SCRIPT = """
import atexit, sys
print(__name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
print(sorted(name for name in globals() if name.startswith("__")), sys.stdin.read())
atexit.register(print, "at exit")
def end(how):
    if how == "error":
        try:
            {}[how]
        except KeyError as error:
            raise ValueError("no") from error
    if how == "interrupt":
        raise KeyboardInterrupt
    sys.exit(how)
end(int(sys.argv[1]) if sys.argv[1].isdecimal() else sys.argv[1])
"""


def run(here: Path, *words: object, given: str = "", **more: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=here, input=given, capture_output=True, text=True,
        timeout=180, env=clean_environment(**more),
    )  # fmt: skip
    # addresses differ from run to run
    return done.returncode, re.sub("0x[0-9a-f]+", "", done.stdout), done.stderr


@pytest.mark.parametrize("how", ["0", "3", "a reason", "error", "interrupt"])
@pytest.mark.parametrize("target", [("script.py",), ("-m", "package.module"), ("package",)], ids=str)
def test_script_runs_as_python_runs_it(tmp_path: Path, target: tuple[str, ...], how: str) -> None:
    (tmp_path / "package").mkdir()
    for name in ("script.py", "package/module.py", "package/__main__.py"):
        (tmp_path / name).write_text(SCRIPT)
    words = (*target, how, "-x", "--output_dir")
    plain = run(tmp_path, *words, given="typed")
    traced = run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", *words, given="typed")
    assert traced == plain and "typed" in plain[1]
    assert any(event["name"] == "end" for event in read_events(tmp_path / "run"))  # the trace was closed


def test_hook_that_does_not_fit_says_so(tmp_path: Path) -> None:
    """A library of another shape; the script goes on, with its own result."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "script.py").write_text("import torch\nprint(torch.__version__)\n")
    code, out, err = run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", "script.py")
    assert (code, out) == (0, "9.9\n") and "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == len(HOOKS["torch"]) and all(
        line.startswith("dlrm.traced: torch 9.9: ") for line in lines
    ), err


def test_mistakes(tmp_path: Path) -> None:
    for words, said in (
        (["none.py"], "no such script"), (["--output_dirs", "x", "a.py"], "did you mean --output_dir"),
        ([], "no script is named"), (["-m"], "-m needs the name of a module"),
    ):  # fmt: skip
        code, out, err = run(tmp_path, "-m", "dlrm.traced", *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and said in err
    assert os.listdir(tmp_path) == []


def test_a_run_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    config = tmp_path / "run" / "config.json"
    for name, code in (("a.py", 0), ("a.py", 0), ("b.py", 2)):
        (tmp_path / name).write_text("print('hi')\n")
        found, _, err = run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", name)
        assert found == code, err
        assert json.loads(config.read_text())["launch"]["model"] == "a.py"
    assert "has a run of a.py" in err and err.count("\n") == 1


def test_numpy_reads_open_files_as_ever(tmp_path: Path) -> None:
    """From any place, small arrays and large ones, buffered or not: the same items, the same place."""
    (tmp_path / "script.py").write_text(
        "import numpy as np\n"
        "for size in (10, 1000, 100_000):\n"
        "    np.save('a.npy', np.arange(size)); np.arange(size).tofile('a.bin')\n"
        "    print(np.load('a.npy').sum(), np.fromfile('a.bin', count=3, offset=8))\n"
        "    for buffer in (0, 16, -1):\n"
        "        with open('a.bin', 'rb', buffering=buffer) as file:\n"
        "            for kind, count, skip in ((np.uint8, 4, 0), (np.int32, 1, 0), (np.uint8, -1, 1)):\n"
        "                found = np.fromfile(file, kind, count, offset=skip)\n"
        "                print(found.sum(), file.tell(), file.read(1))\n"
        "open('b.bin', 'wb').write(bytes(83))\n"
        "for count in (-1, 3, 100):  # beyond the end, with a part of an item before it\n"
        "    for skip in (0, 40, 80, 81, 200):\n"
        "        for file in ('b.bin', open('b.bin', 'rb'), open('b.bin', 'rb', buffering=0)):\n"
        "            try:\n"
        "                found = np.fromfile(file, np.int64, count, offset=skip)\n"
        "                print(found.nbytes, found.flags.owndata, file == 'b.bin' or file.tell())\n"
        "            except ValueError as error:\n"
        "                print(error)\n"
    )
    traced = run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", "script.py")
    assert traced == run(tmp_path, "script.py") and traced[0] == 0
    names = [event["name"] for event in read_events(tmp_path / "run")]
    assert names.count("read") > 3 * 3 * 3


def test_wrong_option_of_the_script_leaves_nothing(tmp_path: Path) -> None:
    """What argparse says is the script's own; of a folder that was there only what this run has put there."""
    (tmp_path / "script.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr', type=float)\n"
        "parser.parse_args()\nopen('ran', 'w').close()\n"
    )
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").write_text("mine")
    there = sorted(os.listdir(tmp_path))
    for words in (["--lr", "x"], ["--help"]):
        plain = run(tmp_path, "script.py", *words)
        for place in (["--output_dir", "run"], ["--output_dir", "kept"], []):
            assert run(tmp_path, "-m", "dlrm.traced", *place, "script.py", *words) == plain
            assert sorted(set(os.listdir(tmp_path)) - {"results"}) == there
            left = set(os.listdir(tmp_path / "kept")) - {".dlrm-io.json", ".dlrm-io.lock"}
            assert left == {"mine"}
    assert not os.path.exists(tmp_path / "results") or os.listdir(tmp_path / "results") == []
    assert run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", "script.py", "--lr", "1")[0] == 0
    assert (tmp_path / "run/config.json").exists() and (tmp_path / "ran").exists()


def test_epochs_of_loops_of_all_kinds(tmp_path: Path) -> None:
    """Left early, with workers that stay, over a second loader meanwhile; only counting the data is none."""
    (tmp_path / "script.py").write_text(
        "import itertools, torch\n"
        "data = torch.utils.data.TensorDataset(torch.ones(40, 1))\n"
        "def load(workers=0):\n"
        "    return torch.utils.data.DataLoader(\n"
        "        data, 10, num_workers=workers, persistent_workers=bool(workers))\n"
        "net = torch.nn.Linear(1, 1)\n"
        "optimizer = torch.optim.SGD(net.parameters(), 0.1)\n"
        "def train(batches):\n"
        "    for batch in batches:\n"
        "        net(batch[0]).sum().backward()\n"
        "        optimizer.step()\n"
        "first, kept, other = load(), load(1), load()\n"
        "print(sum(len(batch[0]) for batch in first))\n"
        "train(first)\n"
        "train(itertools.islice(first, 3))\n"
        "train(batch for batch, _ in zip(first, itertools.chain(other, other)))\n"
        "with torch.no_grad():\n"
        "    print(sum(len(batch[0]) for batch in other))\n"
        "train(other)\n"
        "for _ in range(2):\n"
        "    train(itertools.islice(kept, 2))\n"
    )
    traced = run(tmp_path, "-m", "dlrm.traced", "--output_dir", "run", "script.py")
    assert traced == run(tmp_path, "script.py") and traced[0] == 0
    events = read_events(tmp_path / "run")
    steps = [e for e in events if (e.get("cat"), e["name"]) == ("train", "step")]
    epochs = sorted(
        (e for e in events if (e.get("cat"), e["name"]) == ("pipeline", "epoch")), key=lambda e: e["ts"]
    )
    inside = [
        sum(e["ts"] <= s["ts"] and s["ts"] + s["dur"] <= e["ts"] + e["dur"] for s in steps) for e in epochs
    ]
    assert inside == [4, 3, 4, 4, 2, 2] and len(steps) == sum(inside)
    assert [e["args"]["epoch"] for e in epochs] == [1, 2, 3, 1, 0, 1]
    assert all(one["ts"] + one["dur"] <= two["ts"] for one, two in zip(epochs, epochs[1:], strict=False))


def test_pipelines_of_torchrec(tmp_path: Path) -> None:
    ranks = {
        "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }  # fmt: skip
    script = SUPPORT / "pipeline_training.py"
    lines = [[script, "plain.txt"], ["-m", "dlrm.traced", "--output_dir", "run", script, "traced.txt"]]
    with ThreadPoolExecutor() as pool:
        plain, traced = pool.map(lambda line: run(tmp_path, *line, **ranks), lines)
    assert plain[0] == traced[0] == 0, traced
    assert "not traced" not in traced[2]
    assert (tmp_path / "plain.txt").read_text() == (tmp_path / "traced.txt").read_text()
    events = read_events(tmp_path / "run")
    steps = [e["args"] for e in events if (e.get("cat"), e["name"]) == ("train", "step")]
    assert [(args["step"], args["epoch"]) for args in steps] == [(n + 1, n // 6) for n in range(12)]
    assert sum((e.get("cat"), e["name"]) == ("eval", "eval_step") for e in events) == 6
    assert sum((e.get("cat"), e["name"]) == ("compute", "forward") for e in events) == 18


def test_profiled_steps_by_a_variable_of_the_job_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    asked = ("-m", "dlrm.traced.script_options", tmp_path, "--epochs", 3)
    code, out, _ = run(tmp_path, *asked, MODEL="train.py", PROFILE_STEPS="2-3")
    assert code == 0
    assert out.endswith("\0".join(["--profile_steps", "2-3", "train.py", "--epochs", "3", ""]))
    code, _, err = run(tmp_path, *asked, MODEL="train.py", PROFILE_STEPS="3-2")
    assert code == 2 and "first and the last step" in err and "Traceback" not in err
