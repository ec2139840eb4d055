"""What an event means: its kind (io, wait, communication, copy, compute) and, for a call, its operation.

Names are the trainer's own, torchrec's markers, and those that DFTracer's users give by habit. What no
rule knows has no kind: its time counts as "other", it is never counted as work.
"""

import re
from functools import lru_cache

import polars as pl

# When several are open at once on the main thread, the first of these has the time.
KINDS = ("io", "wait", "communication", "copy", "compute")
OTHER = "other"
DATASET_CATS = ("data", "dataset", "reader", "data_loader", "dataloader")  # whose reads are of the dataset
KERNEL_COUNTERS = "proc/"  # the beginning of the names of what the kernel counts of a process
CALLS = ("POSIX", "STDIO")  # intercepted calls; what MPI-IO and HDF5 do shows in these, so they are spans

_EXCHANGE = (
    r"wait\(\)", r"_wait\]", "all2all", "alltoall", r"_dist\b", r"_dist\]", "sparse_data_dist", "all_?gather",
    "all_?reduce", "reduce_?scatter", "prefetch_embeddings_wait",
)  # fmt: skip
_MOVES = r".*(read|open|load|fetch|get_sample|write|save).*"
_SPANS = [  # category, name, kind; the first that matches wins
    (r"counter|clock|dftracer", r".*", None),
    (r"data|ssd", r"wait", "wait"),
    (r"data", r"read", "io"),
    (r"data", r"assemble", "compute"),
    (r"checkpoint", r"write|load|read", "io"),
    (r"checkpoint", r"copy", "copy"),
    (r"train", r"step", "compute"),
    (r"train", r"report", "communication"),  # the loss is summed over the ranks
    (r"eval", r"eval_step|auroc", "compute"),
    (r"startup", r"process_group", "communication"),
    (r"prep", r".*", "compute"),
    (r"startup|train|eval|checkpoint", r".*", None),  # whole phases, not work
    (r"torchrec", r"wait_for_batch|copy_batch_to_(gpu|device).*|.*h2d.*", "copy"),
    (r"torchrec", r"next_batch|.*dataloader.*", None),  # the data/wait span inside is the waiting
    (r"torchrec", f".*({'|'.join(_EXCHANGE)}).*", "communication"),
    (r"torchrec", r".*", "compute"),
    # traces of other programs: the categories of dftracer's own AI logging, of DLIO, of MPI-IO and HDF5
    (r"mpiio|hdf5", r".*(read|write|open|close|sync).*", "io"),
    (r"comm|communication|nccl|mpi", r".*", "communication"),
    (r"device|transfer", r".*", "copy"),
    (r"dataloader|data_loader", r"fetch.*|wait.*|next.*|yield.*", "wait"),
    (r"reader|data|dataset|data_loader|dataloader|io|storage", _MOVES, "io"),
    (r"compute|model|ai_framework|framework", r".*", "compute"),
    (r".*", r"forward|backward|optimizer|compute|train_step|training_step", "compute"),
]  # fmt: skip
_RULES = [(re.compile(cat, re.I), re.compile(name, re.I), kind) for cat, name, kind in _SPANS]

_OPS = [
    # their event names one of the two files only: what is copied from, and what is sent to
    (r"copy_file_range", "read"),
    (r"sendfile(64)?", "write"),
    (
        r"(p?readv?(64)?(v2)?|(fread|f?getc)(_unlocked)?|fgets|getline|getdelim|getw|mpi_file_i?read.*"
        r"|h5dread.*)",
        "read",
    ),
    (
        r"(p?writev?(64)?(v2)?|(fwrite|f?putc)(_unlocked)?|fputs|putw|v?fprintf|mpi_file_i?write.*"
        r"|h5dwrite.*)",
        "write",
    ),
    (r"(open(at)?(64)?|creat(64)?|f(d)?open(64)?|freopen(64)?|mpi_file_open|h5fopen|h5fcreate)", "open"),
    (r"(f?close|mpi_file_close|h5fclose)", "close"),
    (r"(l?seek(64)?|_?llseek|fseek(o)?(64)?|rewind|ftell(o)?(64)?)", "seek"),
    (r"(_+[fl]?xstat(at)?(64)?|[fl]?stat(at|fs|vfs|x)?(64)?|f?access(at)?|readlink(at)?)", "stat"),
    (r"(f(data)?sync|msync|sync|fflush|sync_file_range)", "sync"),
    (r"(mmap(64)?|munmap|mremap)", "map"),
    (r"((posix_)?[fm]advise(64)?|readahead)", "hint"),  # what will be read; moves nothing
]  # fmt: skip
_CALLS = [(re.compile(pattern, re.I), op) for pattern, op in _OPS]
DATA_OPS = ("read", "write")
# parts of paths of what a program loads of itself
PROGRAM_FILE = r"\.(py|pyc|pyi|so)(\.|$)|/(site|dist)-packages(/|$)|/lib(64)?/python3[^/]*(/|$)"
SYSTEM_FILE = r"^/(proc|sys|dev|etc)/"  # of what the system makes up or is configured by

_KERNEL_FILE = re.compile(r"/(proc|sys|dev)(/|$)")
_NO_DATA_FILE = re.compile(f"{PROGRAM_FILE}|{SYSTEM_FILE}")


@lru_cache(4096)
def is_kernel_file(path: str) -> bool:
    """Whether the kernel makes the file up, so that no storage holds it."""
    return _KERNEL_FILE.match(path) is not None


@lru_cache(4096)
def is_program_file(path: str) -> bool:
    """Whether a program loads the file of itself, or it is the system's."""
    return _NO_DATA_FILE.search(path) is not None


def find_kind(cat: str, name: str) -> str | None:
    """The kind of a span, or None for one that only groups others."""
    if cat in CALLS:
        return "io"
    return next((kind for c, n, kind in _RULES if c.fullmatch(cat) and n.fullmatch(name)), None)


@lru_cache(4096)
def find_operation(name: str) -> str:
    """The operation of an intercepted call; any that is not listed is "other"."""
    return next((op for pattern, op in _CALLS if pattern.fullmatch(name)), OTHER)


def find_span_operation(cat: str, name: str) -> str | None:
    """The operation of a span of the application that reads or writes, or None."""
    if find_kind(cat, name) != "io" or cat in CALLS:
        return None
    return "write" if re.search(r"writ|save|dump", name, re.I) else "read"


def classify(events: pl.DataFrame) -> pl.DataFrame:
    """cat, name -> kind, op: each distinct pair is looked at once, however many events there are."""
    pairs = events.select(pl.col("cat", "name").cast(pl.String)).unique().sort("cat", "name")
    rows = list(pairs.iter_rows())
    return pairs.with_columns(
        pl.Series("kind", [find_kind(cat, name) for cat, name in rows], pl.String),
        pl.Series(
            "op", [find_operation(n) if c in CALLS else find_span_operation(c, n) for c, n in rows], pl.String
        ),
    )
