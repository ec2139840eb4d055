"""Runs of other programs: the names of DFTracer's own AI logging and of DLIO as phases, steps and kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from support.made_traces import Made, training
from support.reports import analysis as run_analysis

import analysis
from analysis.trace.classify import is_understood
from analysis.workload.steps import measure_steps

TRAINING = """
import json, sys, time
from dftracer.python import ai, dft_fn, dftracer

log = dftracer.initialize_log(logfile=sys.argv[1] + "/trace/ai", data_dir=sys.argv[1], process_id=-1)
for epoch in ai.pipeline.epoch.iter(range(1, 3), include_iter=False):
    with ai.pipeline.train:
        for step, _ in enumerate(ai.dataloader.fetch.iter(range(4)), 1):
            ai.update(epoch=epoch, step=step)
            with ai.data.item, ai.data.preprocess:
                time.sleep(0.001)
            with ai.compute.forward:
                time.sleep(0.004)
            with ai.comm.all_reduce:
                time.sleep(0.002)
    with ai.pipeline.evaluate:
        time.sleep(0.003)
    with ai.checkpoint.capture, ai.checkpoint.io.write:
        open(sys.argv[1] + "/model", "w").write("weights")
with dft_fn("strange", name="thing<b>"):
    pass
log.finalize()


def list_names(of):
    for child in of._children.values():
        cat, name = str(child.profiler._cat), child.profiler._name
        yield from ((cat, name), (cat, name + ".init"), (cat, name + ".iter"), (cat, name + ".block"))
        yield from list_names(child)


print(json.dumps(list(list_names(ai))))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A run of DFTracer's AI logging, and the (category, name) of all that it can log."""
    run = tmp_path_factory.mktemp("run")
    (run / "trace").mkdir()
    env = {**os.environ, "DFTRACER_ENABLE": "1", "DFTRACER_INC_METADATA": "1", "DFTRACER_INIT": "FUNCTION"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, run], env=env, cwd=run, capture_output=True, text=True, check=True
    )
    return run, json.loads(done.stdout.splitlines()[-1])


def test_all_names_of_dftracer_are_understood(traced: tuple[Path, list[list[str]]]) -> None:
    _, names = traced
    assert len(names) > 100
    assert [name for name in names if not is_understood(*name)] == []


def test_steps_epochs_and_kinds_of_dftracer_names(traced: tuple[Path, list[list[str]]]) -> None:
    run, _ = traced
    loaded = analysis.load(run)
    steps = loaded.steps.sort("ts")
    assert steps.select("epoch", "step").rows() == [(e, s) for e in (1, 2) for s in (1, 2, 3, 4)]
    out, _ = run_analysis("report", run)
    phases = pl.read_csv(run / "tables" / "phases.csv")
    of = {phase: phases.filter(pl.col("phase") == phase) for phase in ("train", "evaluate", "checkpoint")}
    train = of["train"].sum()
    assert train["compute_s"][0] >= 8 * 0.005 and train["communication_s"][0] >= 8 * 0.002
    assert train["wait_s"][0] < 0.01  # the body of the loop over batches is not waiting
    assert of["evaluate"]["wall_s"].sum() >= 2 * 0.003 and of["checkpoint"]["wall_s"].sum() > 0
    assert "Nothing is known about the names of 1 span" in out and "strange/thing<b>" in out
    assert "thing<b>" not in (run / "report.html").read_text()
    out, _ = run_analysis("perfetto", run, "--steps", "2-3")
    assert "steps2-3" in out


def test_names_of_dlio(tmp_path: Path) -> None:
    """Categories are DLIO's modules, names its functions."""
    made = Made(None, pid=7)
    made.span("dlio_benchmark", "DLIOBenchmark._train", 0, 9000, epoch=1)
    made.span("data_loader", "TorchDataLoader.read", 100, 50)
    made.span("dlio_benchmark", "loop.iter", 150, 1850, epoch=1, step=1)
    made.span("data_loader", "loop.yield", 1990, 6600, step=1)
    made.span("dlio_benchmark", "loop.yield", 2000, 6500, epoch=1, step=1)
    made.span("reader", "NPZReader.open", 200, 1800)
    made.span("ai_framework", "TorchFramework.compute", 2000, 6000)
    made.span("dlio_benchmark", "DLIOBenchmark._eval", 9000, 1000, epoch=1)
    made.write(tmp_path)
    out, _ = run_analysis("report", tmp_path)
    table = pl.read_csv(tmp_path / "tables" / "phases.csv")
    train = table.filter(pl.col("phase") == "train")
    times = train.select("wall_s", "compute_s", "io_s", "wait_s").row(0)
    assert times == pytest.approx((0.009, 0.006, 0.0018, 0.00005))
    assert analysis.load(tmp_path).steps.select("epoch", "step").rows() == [(1, 1)]
    assert table.filter(pl.col("phase") == "evaluate")["wall_s"].to_list() == [0.001]
    assert "Nothing is known" not in out


EARLIER = {
    ("dataloader", "fetch.iter"): ("data", "wait"), ("data", "preprocess"): ("data", "assemble"),
    ("pipeline", "epoch"): ("train", "epoch"), ("pipeline", "evaluate"): ("eval", "evaluate"),
    ("compute", "forward"): ("torchrec", "forward"), ("compute", "backward"): ("torchrec", "backward"),
}  # fmt: skip


def test_earlier_names_of_this_project(tmp_path: Path) -> None:
    """The same tables and steps, and one sentence in the report."""
    found = {}
    for which in ("now", "earlier"):
        made = training(steps=6, wait=3_000)
        made.span("data", "preprocess", 10_900, 50, 7, epoch=0, step=1, batch=0)
        made.span("pipeline", "evaluate", 90_000, 5_000, split="val", epoch=0, step=6)
        made.span("eval", "eval_step", 90_100, 4_000, batch=0)
        for line in made.lines if which == "earlier" else ():
            line["cat"], line["name"] = EARLIER.get((line["cat"], line["name"]), (line["cat"], line["name"]))
        run = tmp_path / which
        made.write(run)
        (run / "config.json").write_text('{"data": {}, "launch": {}}')
        out, _ = run_analysis("report", run)
        work = measure_steps(run)
        pauses = work.pauses["name"].str.replace("eval/evaluate", "pipeline/evaluate").to_list()
        tables = [(run / "tables" / f"{name}.csv").read_text() for name in ("phases", "steps")]
        found[which] = tables, work.steps.rows(), work.batches.rows(), pauses
        said = "was made before December 2026" in out
        assert said == (which == "earlier"), out
    assert found["now"] == found["earlier"]
    assert found["now"][3] == ["pipeline/evaluate"]


def test_training_around_epochs(tmp_path: Path) -> None:
    """DFTracer's documentation has `pipeline.train` around all epochs: it is a phase only without them."""
    for which in ("epochs", "none"):
        made = Made(None, pid=7)
        for epoch in range(2 if which == "epochs" else 0):
            made.span("pipeline", "epoch.block", 1000 + 4000 * epoch, 4000, epoch=epoch)
        made.span("pipeline", "train", 1000, 9000, epoch=1)
        made.span("ai_root", "ai_root", 0, 10_000)
        made.write(tmp_path / which)
        out, _ = run_analysis("report", tmp_path / which)
        assert "Nothing is known" not in out
        table = pl.read_csv(tmp_path / which / "tables" / "phases.csv").filter(pl.col("phase") == "train")
        assert table["wall_s"].to_list() == [0.008 if which == "epochs" else 0.009]


def test_records_of_gpus(tmp_path: Path) -> None:
    """As DFTracer's documentation names them: counted and named, and in no time of the main thread."""
    made = training(steps=4)
    for number in range(3):
        made.span("CUDA_KERNEL", "gemm<float>", 20_000 + 100 * number, 90, 40, device_id=0, stream_id=7)
    made.span("CUDA_MEMCPY", "MemcpyHtoD", 21_000, 50, 40, bytes=4096, copy_kind=1)
    made.span("CUDA_RUNTIME_API", "cudaStreamSynchronize_v3020", 22_000, 900)
    made.span("KERNEL_DISPATCH", "Cijk", 23_000, 50, 41)
    plain = training(steps=4)
    found = {}
    for name, each in (("gpu", made), ("plain", plain)):
        each.write(tmp_path / name)
        out, _ = run_analysis("report", tmp_path / name)
        found[name] = (tmp_path / name / "tables" / "phases.csv").read_text()
        said = (
            "6 records of GPUs (CUDA_KERNEL 3, CUDA_MEMCPY 1, CUDA_RUNTIME_API 1, KERNEL_DISPATCH 1)" in out
        )
        assert said == (name == "gpu"), out
        assert "Nothing is known" not in out
    assert found["gpu"] == found["plain"]
    assert "gemm<float>" not in (tmp_path / "gpu" / "report.html").read_text()
