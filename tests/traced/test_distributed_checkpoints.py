"""torch.distributed.checkpoint under torchrun: every byte of its files is in the trace, each save a span."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.file_calls import count_strace_calls, count_traced_calls, list_strace_words, read_events
from support.job_scripts import clean_environment

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

out = sys.argv[1]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(300_000.0).reshape(-1, 3)
state = {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "step": torch.tensor(7)}
dcp.save(state, checkpoint_id=f"{out}/one")
dcp.async_save(state, checkpoint_id=f"{out}/two").result()
for name in ("one", "two"):
    found = {"rows": distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]), "step": torch.tensor(0)}
    dcp.load(found, checkpoint_id=f"{out}/{name}")
    assert torch.equal(found["rows"].full_tensor(), whole) and found["step"] == 7
dist.destroy_process_group()
"""


@pytest.mark.mpi
def test_every_byte_is_in_the_trace(tmp_path: Path) -> None:
    script, out, run = tmp_path / "script.py", tmp_path / "out", tmp_path / "run"
    script.write_text(SCRIPT)
    strace = list_strace_words(tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "--no_python", *strace, sys.executable, "-m", "dlrm.traced", "--output_dir", run, script, out,
        ],
        cwd=ROOT, env=clean_environment(OMP_NUM_THREADS=1), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "not traced" not in done.stderr, done.stderr
    events = read_events(run)
    spans = Counter((e["name"], e["args"]["file"]) for e in events if e.get("cat") == "checkpoint")
    assert spans == {(name, str(out / each)): 2 for name in ("save", "load") for each in ("one", "two")}
    traced = count_traced_calls(events).below(out)
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*.distcp")}
    assert len(sizes) == 4
    for name, size in sizes.items():
        assert traced[name, "write"][1] == size
    logs = [path.read_text() for path in tmp_path.glob("calls.*")]
    assert not strace or traced == count_strace_calls("".join(logs)).below(out)
