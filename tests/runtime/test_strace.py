"""One table: every source, sink and tool of the project, its calls by the trace against those by strace.

For each program and each file: how many calls of a kind, and how many bytes they moved.
"""

import fnmatch
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.file_calls import STRACED, count_strace_calls, count_traced_calls, read_events

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
ROOT = Path(__file__).parents[2]
READ_SOURCES = """
import sys
run, *sources = sys.argv[1:]
from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks
trace.start_tracing(run, Ranks(), "train")
from dlrm.data.readers import open_source
from dlrm.data.batches import BatchLoader
for kind, folder in zip(sources[::2], sources[1::2]):
    for stage in ("train", "test"):
        source = open_source(kind, folder, stage, read_chunk_mb=0.03)
        assert sum(len(batch.labels) for batch in BatchLoader(source, 100)) > 0
        source.close()
trace.stop_tracing()
"""
TRAIN = [
    "-m", "dlrm.train", "--preset", "toy", "--in_memory_binary_criteo_path", "{npy}", "--batch_size", 50,
    "--report_every", 1, "--checkpoint_every_steps", 2, "--checkpoint_dir", "{checkpoints}", "--tensorboard",
    "--limit_val_batches", 1, "--limit_test_batches", 1, "--trace", "--output_dir", "{run}",
]  # fmt: skip
SSD = ["--store_type", "cached_ssd", "--persistent_path", "{store}", "--cache_memory_budget_mb", 1]
STRACE = ["strace", "-f", "-y", "--seccomp-bpf", "-e", f"trace={STRACED}"]
BERT4REC: list[Any] = [
    "-m", "dlrm.bert4rec", "--dataset_path", "{ratings}", "--cache_dir", "{prepared}", "--max_len", 6,
    "--train_batch_size", 16, "--emb_dim", 8, "--num_layers", 1, "--max_steps", 2, "--negatives", 5,
    "--checkpoint_every_steps", 1, "--checkpoint_dir", "{run}/saved", "--trace", "--output_dir", "{run}",
]  # fmt: skip
PREP: list[Any] = ["-m", "dlrm.prep"]
TRACED = ["--trace_dir", "{run}"]
# In this order, as some read what others have written. {run}: a folder of the program's own.
PROGRAMS: dict[str, list[Any]] = {
    "prep run": [
        *PREP, "run", "--input_dir", "{gz}", "--output_dir", "{npy}", "--part_bytes", 30_000, *TRACED,
    ],
    "prep run, Parquet": [
        *PREP, "run", "--input_dir", "{tsv}", "--output_dir", "{parquet}", "--format", "parquet", *TRACED,
    ],
    "prep parse": [
        *PREP, "parse", "--input_dir", "{tsv}", "--output_dir", "{parsed}", "--workers", 2, *TRACED,
    ],
    "prep contiguous": [
        *PREP, "contiguous", "--input_dir", "{parsed}", "--output_dir", "{contiguous}", *TRACED,
    ],
    "prep shuffle": [
        *PREP, "shuffle", "--input_dir_labels_and_dense", "{parsed}", "--input_dir_sparse", "{contiguous}",
        "--output_dir_shuffled", "{shuffled}", *TRACED,
    ],
    "prep multihot": [
        *PREP, "multihot", "--input_dir", "{npy}", "--output_dir", "{multi_hot}",
        "--multi_hot_sizes", ",".join("2" * 26), "--copy_labels_and_dense", *TRACED,
    ],
    "prep check": [*PREP, "check", "{npy}", *TRACED],
    "sources": [
        "-c", READ_SOURCES, "{run}", "stream", "{npy}", "memory", "{npy}", "mmap", "{npy}",
        "multi_hot", "{multi_hot}", "parquet", "{parquet}",
    ],
    "training": [*TRAIN, "--max_steps", 4, *SSD],
    "resuming": [*TRAIN, "--max_steps", 6, *SSD],
    "bench": [
        "-m", "dlrm.bench", "--load_checkpoint_path", "{checkpoints}",
        "--in_memory_binary_criteo_path", "{npy}", "--batch_sizes", 10,
        "--seconds", 0, "--iterations", 1, "--benchmark_warmup_steps", 0, *TRACED,
    ],
    "BERT4Rec": BERT4REC,
    "BERT4Rec, prepared": BERT4REC,
}  # fmt: skip
# the tracer's own files, and those that are read before it starts: whose folder is it
UNSEEN = ("/trace/", "/.dlrm-io.json", "/.dlrm-io.lock")
Calls = dict[tuple[str, str], tuple[int, int]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strace")


@pytest.fixture(scope="module")
def calls(folders: Path) -> dict[str, tuple[Calls, Calls]]:
    """program -> by strace, by the trace: (file, operation) -> calls, bytes."""
    base = folders
    toy = [sys.executable, *PREP, "toy", str(base / "tsv"), "--days", "3", "--rows", "300"]
    subprocess.run(toy, cwd=ROOT, check=True, capture_output=True)
    (base / "gz").mkdir()
    for number in range(3):
        text = (base / "tsv" / f"day_{number}").read_bytes()
        (base / "gz" / f"day_{number}.gz").write_bytes(gzip.compress(text, 1))
    ratings = [f"{user} {(user * 7 + item * 3) % 40} {item}\n" for user in range(30) for item in range(12)]
    (base / "ratings").write_text("".join(ratings))
    names = (
        "tsv", "gz", "npy", "parquet", "parsed", "contiguous", "shuffled", "multi_hot", "checkpoints",
        "store", "ratings", "prepared",
    )  # fmt: skip
    places = {name: base / name for name in names}
    found = {}
    for number, (program, words) in enumerate(PROGRAMS.items()):
        run, log = base / f"run{number}", base / f"log{number}"
        command = [each if each == READ_SOURCES else str(each).format(**places, run=run) for each in words]
        done = subprocess.run(
            [*STRACE, "-o", log, sys.executable, *command],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stderr[-2000:]}"
        if program == "prep contiguous":  # as torchrec's third script wants them
            for path in places["contiguous"].glob("*.npy"):
                path.rename(path.with_name(path.name.replace("_contig_freq", "")))
        by_strace = count_strace_calls(log.read_text(errors="replace"))
        by_trace = count_traced_calls(read_events(run))
        found[program] = by_strace.below(base, *UNSEEN), by_trace.below(base, *UNSEEN)
    return found


# what each program must have done at least: it must not be that both saw nothing
DONE = {
    "prep run": ["read gz/day_0.gz", "write npy/*/day_2_sparse.npy", "read npy/*/piece_*.runs"],
    "prep run, Parquet": ["read tsv/day_2", "write parquet/*/train/part_*.parquet"],
    "prep parse": ["read tsv/day_0", "write parsed/*/day_0_dense.npy"],
    "prep contiguous": ["read parsed/day_0_sparse.npy", "write contiguous/*/day_0_sparse*.npy"],
    "prep shuffle": ["read contiguous/day_2_sparse.npy", "write shuffled/*/day_2_sparse.npy"],
    "prep multihot": ["read npy/day_1_labels.npy", "read *table_25.i4", "write *day_2_sparse_multi_hot.npz*"],
    "prep check": ["read npy/meta.json", "read npy/day_2_sparse.npy"],
    "sources": [
        "read npy/day_0_sparse.npy", "read multi_hot/day_0_sparse_multi_hot.npz", "read parquet/train/*",
    ],
    "training": [
        "read npy/day_0_sparse.npy", "write checkpoints/*.safetensors", "sync checkpoints/*.safetensors",
        "write store/t_cat_0.rows", "read store/t_cat_0.rows", "write run*/metrics.jsonl",
        "write run*results.json*", "write run*/tensorboard/*",
    ],
    "resuming": ["read checkpoints/00002-step-4/rank00000.safetensors", "read store/t_cat_0.json"],
    "BERT4Rec": ["read ratings", "write prepared/*", "write run*/saved/*.safetensors"],
    "BERT4Rec, prepared": ["read prepared/*"],
    "bench": ["read checkpoints/*.safetensors", "read npy/day_2_dense.npy"],
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_trace_equals_strace(calls: dict[str, tuple[Calls, Calls]], program: str) -> None:
    by_strace, by_trace = calls[program]
    made = [f"{operation} {file}" for file, operation in by_strace]
    assert all(fnmatch.filter(made, pattern) for pattern in DONE[program])
    assert by_trace == by_strace


def test_steps_have_the_numbers_of_the_log(calls: dict[str, tuple[Calls, Calls]], folders: Path) -> None:
    """Also in a resumed run: the spans of steps, and what was counted after each."""
    for program, steps in (("training", [1, 2, 3, 4]), ("resuming", [5, 6])):
        run = folders / f"run{list(PROGRAMS).index(program)}"
        events = read_events(run)
        found = [e["args"]["step"] for e in events if (e.get("cat"), e["name"]) == ("train", "step")]
        assert found == steps
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        counted = [e["args"] for e in events if (e.get("cat"), e["name"]) == ("counter", "loss")]
        assert {args["step"]: args["value"] for args in counted} == pytest.approx(losses, rel=1e-4)
