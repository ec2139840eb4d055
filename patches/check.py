"""Prove an environment: the stack imports together, and the patched torchrec writes a span to a trace.

usage: source env.sh; python patches/check.py

One line on stdout, or one line on stderr and exit code 1.
"""

import argparse
import ctypes
import gzip
import json
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def stack() -> str:
    import fbgemm_gpu  # noqa: F401
    import mpi4py
    import torch
    import torchrec

    mpi4py.rc.initialize = False  # a login node may load the library but not start MPI
    from mpi4py import MPI

    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    library = " ".join(MPI.Get_library_version().split("\n")[0].strip("\x00").split())
    return (
        f"torch {torch.__version__}, torchrec {torchrec.__version__}, dftracer {version('dftracer')}, "
        f"mpi4py {version('mpi4py')} on {library}, {torch.cuda.device_count()} GPU(s)"
    )


def traced_names(folder: str) -> set[str]:
    """Names of the spans of one real pipelined training step, read back from the trace file."""
    import torch
    from torchrec.distributed.train_pipeline import TrainPipelineBase

    from dlrm.runtime import ranks, trace

    class Model(torch.nn.Linear):
        def forward(self, batch: torch.Tensor):  # a pipeline wants (loss, output)
            output = super().forward(batch)
            return output.sum(), output

    trace.start_tracing(folder, ranks.find_ranks(), role="check")
    model = Model(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrainPipelineBase(model, optimizer, torch.device("cpu")).progress(iter([torch.ones(3, 2)] * 2))
    trace.stop_tracing()
    names = set()
    for path in Path(folder, "trace").glob("*.pfw.gz"):
        lines = gzip.decompress(path.read_bytes()).decode(errors="replace").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        names |= {event["name"] for event in events}
    return names


def lacks_driver() -> bool:
    """A login node: the CUDA fbgemm is installed, but it links against a driver that is not."""
    try:
        version("fbgemm-gpu")
        ctypes.CDLL("libnvidia-ml.so.1")
    except PackageNotFoundError:
        return False
    except OSError:
        return True
    return False


def main() -> None:
    argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1]).parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if lacks_driver():
        print("no NVIDIA driver on this node: prove the environment on a GPU node, python patches/check.py")
        return
    try:
        what = stack()
        with tempfile.TemporaryDirectory() as folder:
            names = traced_names(folder)
        missing = {"forward", "backward", "optimizer"} - names
        if missing:
            raise RuntimeError(f"torchrec's {sorted(missing)} did not reach the trace: are the patches in?")
    except Exception as error:
        sys.exit(f"patches/check.py: {type(error).__name__}: {error}")
    print(what)


if __name__ == "__main__":
    main()
