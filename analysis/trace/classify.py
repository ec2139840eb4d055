"""What an event means: its kind (io, wait, communication, copy, compute) and, for a call, its operation.

The table DIALECTS says how programs name their spans: this project's trainer, which has DFTracer's AI
categories where there is one, torchrec's markers, DLIO, and what people use by habit. What none of them has,
has no kind: its time counts as "other", never as work, and the report names it.
"""

import re
from functools import lru_cache
from typing import NamedTuple

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

# The parts of a run that a span can be, whatever its program calls it. TRAINING: all epochs. SETUP: none of
# them, though its category says so.
STEP, EPOCH, TRAINING, EVALUATION, SETUP = "step", "epoch", "training", "evaluation", "setup"
OWN_STEPS = "train"  # the category of this project's steps, which count where a trace has others, too
PREPROCESS = ("preprocess", "assemble")  # names, of category data, of making a batch of what was read


class Meaning(NamedTuple):
    """What the spans of one category and name are. A kind of None: they only group others."""

    cat: str  # patterns of the whole text, upper or lower case
    name: str
    kind: str | None
    part: str | None = None


# Who names spans so -> what they mean. The first that matches wins, from the top of the table.
GPU_CATS = (  # of what DFTracer records of GPUs
    r"CUDA_[A-Z0-9_]+|(HIP|HSA|RCCL|MARKER|OMPT|ROCDECODE|ROCJPEG)_[A-Z0-9_]+|KERNEL_DISPATCH|MEMORY_COPY"
    r"|MEMORY_ALLOCATION|SCRATCH_MEMORY|PAGE_MIGRATION"
)
EARLIER = "this project until November 2026"
DIALECTS: dict[str, tuple[Meaning, ...]] = {
    EARLIER: (
        Meaning(r"data", r"wait", "wait"),
        Meaning(r"data", r"assemble", "compute"),
        Meaning(r"train", r"epoch", None, EPOCH),
        Meaning(r"eval", r"evaluate", None, EVALUATION),
    ),
    "this project": (
        Meaning(r"counter|clock|dftracer", r".*", None),
        Meaning(r"ssd", r"wait", "wait"),
        Meaning(r"data", r"read", "io"),
        Meaning(r"checkpoint", r"write|load|read", "io"),
        Meaning(r"checkpoint", r"copy", "copy"),
        Meaning(r"train", r"step", "compute", STEP),
        Meaning(r"train", r"report", "communication"),  # the loss is summed over the ranks
        Meaning(r"eval", r"eval_step|auroc", "compute", EVALUATION),
        Meaning(r"eval", r".*", None, EVALUATION),
        Meaning(r"startup", r"process_group", "communication"),
        Meaning(r"prep", r".*", "compute"),
        Meaning(r"profile", r"start|write", None),  # torch.profiler, whose time is no training
    ),
    "DFTracer's AI categories": (  # dftracer.python.ai: `x.iter` is the iterator's time, `x.block` the body's
        Meaning(r"pipeline", r"epoch(\.block)?", None, EPOCH),
        Meaning(r"pipeline", r"train(\.block)?", None, TRAINING),
        Meaning(r"pipeline", r"(evaluate|test)(\.block)?", None, EVALUATION),
        Meaning(r"pipeline|ai_root", r".*", None),
        Meaning(r"dataloader", r"fetch\.block", None, STEP),
        Meaning(r"data", r"preprocess(\..*)?", "compute"),
        Meaning(r"data|checkpoint|other", r"[a-z]+\.io\.(open|read|write|close)(\.iter)?", "io"),
        Meaning(r"data", r"(item|data)(\..*)?", None),
        Meaning(r"other", r".*", None),
    ),
    "DLIO until 2.0": (  # the categories are its modules, the names its functions
        Meaning(r"dlio_benchmark", r"(.*\.)?_train", None, EPOCH),
        Meaning(r"dlio_benchmark", r"(.*\.)?_eval", None, EVALUATION),
        Meaning(r"dlio_benchmark|data_loader", r"(<module>|fetch-data|loop)\.iter", "wait"),
        Meaning(r"dlio_benchmark", r"(<module>|fetch-data|loop)\.yield", None, STEP),  # the loop's body
        Meaning(r"data_loader", r"(<module>|fetch-data|loop)\.yield", None),  # what takes its batches
        Meaning(r"dlio_benchmark|config|generator", r".*", None),
        Meaning(r"ai_framework", r"(.*\.)?compute", "compute"),
        Meaning(r"ai_framework", r".*", None),  # what it sets up, and marks of its profiler
        Meaning(r"data_loader", r"(.*\.)?(__getitem__|__init__|__len__|worker_init|finalize)(\.init)?", None),
        Meaning(r"data_loader", r".+\.read", None),  # makes the DataLoader
        Meaning(r"reader", r"(.*\.)?preprocess", "compute"),
        Meaning(r"reader", r"(.*\.)?(next|finalize|__init__)(\.init)?", None),
        Meaning(r"storage", r"(.*\.)?(create|get|delete|walk)_(node|namespace)|(.*\.)?get_uri", None),
        Meaning(r"storage", r"(.*\.)?__init__(\.init)?", None),
        Meaning(r"checkpoint", r".*Checkpointing\.(__init__|get_tensor|finalize)(\.init)?", None, SETUP),
    ),
    "this project's phases": (Meaning(r"startup|train|checkpoint|ssd", r".*", None),),
    "torchrec": (
        Meaning(r"torchrec", r"wait_for_batch|copy_batch_to_(gpu|device).*|.*h2d.*", "copy"),
        Meaning(r"torchrec", r"next_batch|.*dataloader.*", None),  # the waiting is a span inside
        Meaning(r"torchrec", f".*({'|'.join(_EXCHANGE)}).*", "communication"),
        Meaning(r"torchrec", r".*", "compute"),
    ),
    "DFTracer's GPU records": (  # CUPTI's kinds and rocprofiler's; what a GPU does is not the thread's time
        Meaning(GPU_CATS, r".*", None),
    ),
    "MPI-IO and HDF5": (Meaning(r"mpiio|hdf5", r".*(read|write|open|close|sync).*", "io"),),
    "habits": (
        Meaning(r"comm|communication|nccl|mpi", r".*", "communication"),
        Meaning(r"device|transfer", r".*", "copy"),
        Meaning(r"dataloader|data_loader", r"fetch.*|wait.*|next.*|yield.*", "wait"),
        Meaning(r"reader|data|dataset|data_loader|dataloader|io|storage", _MOVES, "io"),
        Meaning(r"compute|model|ai_framework|framework", r".*", "compute"),
        Meaning(r".*", r"forward|backward|optimizer|compute|train_step|training_step", "compute"),
    ),
}  # fmt: skip
_RULES = [
    (re.compile(meaning.cat, re.I), re.compile(meaning.name, re.I), meaning)
    for meanings in DIALECTS.values()
    for meaning in meanings
]

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


@lru_cache(4096)
def find_meaning(cat: str, name: str) -> Meaning | None:
    """The line of the table that a span matches, or None for one that nothing is known about."""
    return next((meaning for c, n, meaning in _RULES if c.fullmatch(cat) and n.fullmatch(name)), None)


def find_kind(cat: str, name: str) -> str | None:
    """The kind of a span, or None for one that only groups others, or that nothing is known about."""
    if cat in CALLS:
        return "io"
    meaning = find_meaning(cat, name)
    return meaning.kind if meaning else None


def find_part(cat: str, name: str) -> str | None:
    """The part of a run that a span is: STEP, EPOCH, EVALUATION or None."""
    meaning = None if cat in CALLS else find_meaning(cat, name)
    return meaning.part if meaning else None


def is_gpu_record(cat: str) -> bool:
    """Whether DFTracer recorded it of a GPU or of the library that drives it."""
    return re.fullmatch(GPU_CATS, cat) is not None


def is_earlier_name(cat: str, name: str) -> bool:
    """Whether this project names such spans otherwise now."""
    return find_meaning(cat, name) in DIALECTS[EARLIER]


def is_understood(cat: str, name: str) -> bool:
    """Whether it is a call, or a span that a dialect has."""
    return cat in CALLS or find_meaning(cat, name) is not None


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
    """cat, name -> kind, part, op: each distinct pair is looked at once, however many events there are."""
    pairs = events.select("cat", "name").unique().cast(pl.String).sort("cat", "name")
    rows = list(pairs.iter_rows())
    return pairs.with_columns(
        pl.Series("kind", [find_kind(cat, name) for cat, name in rows], pl.String),
        pl.Series("part", [find_part(cat, name) for cat, name in rows], pl.String),
        pl.Series(
            "op", [find_operation(n) if c in CALLS else find_span_operation(c, n) for c, n in rows], pl.String
        ),
    )
