"""What came from a device and what from memory, and the file systems of a run's folders.

In: the joined tables: the kernel's counts of each rank (table device) and what its calls moved. Out: bytes
per phase or rank, and a row per folder.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.tables.gather import JoinedTables
from common.errors import UserError, printable
from common.inputs import parse_json

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
# Whose reads Linux counts as a process's own: the block layer does, or the file system itself.
COUNTED = (
    "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "reiserfs", "vfat", "exfat", "ntfs3", "erofs",
    "squashfs", "overlay", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p",
)  # fmt: skip
SIDES = {"memory": IN_MEMORY, "device": COUNTED}  # what a file system's reads count as, else "not known"
NOT_FILES = r"^/(proc|sys)/"
WRITE_RATES = "Rates are the application's: what is written goes to memory first, unless a sync waits for it."
SUMS = (
    "read_bytes", "device_read_bytes", "cache_read_bytes", "write_bytes", "device_write_bytes",
    "major_faults", "minor_faults",
)  # fmt: skip


@dataclass(frozen=True)
class ReadSource:
    """Of the bytes that were read, how many a device gave and how many it did not."""

    device: int
    cache: int

    @property
    def share(self) -> float | None:
        """The device's, from 0 to 1; None where nothing was read."""
        whole = self.device + self.cache
        return self.device / whole if whole else None


def sum_device(j: JoinedTables, *by: str) -> pl.DataFrame:
    """Bytes that calls read and wrote (of mapped files what spans say), and what of it was a device's.

    by: "phase", "rank", or both. `cache_read_bytes` is what was read beyond what devices gave meanwhile: it
    came from memory. A device may also give more than is read: read-ahead, mapped files, programs. Ranks
    without the kernel's counters are left out.
    """
    keys = ("rank", "phase")
    files = j["ops"].filter(~pl.col("file").fill_null("").str.contains(NOT_FILES))
    moved = files.group_by(keys).agg(
        pl.col("bytes").filter(pl.col("op") == op).sum().cast(pl.Int64).alias(f"{op}_bytes")
        for op in ("read", "write")
    )
    known = j["device"].filter(pl.col("device_read_bytes").is_not_null())
    counted = known.group_by(keys).agg(pl.exclude(keys).sum())
    written = (pl.col("device_write_bytes") - pl.col("cancelled_write_bytes")).clip(0)
    both = counted.join(moved, on=keys, how="left").with_columns(
        pl.col("read_bytes", "write_bytes").fill_null(0), written.alias("device_write_bytes")
    )
    beyond = (pl.col("read_bytes") - pl.col("device_read_bytes")).clip(0)
    both = both.with_columns(beyond.alias("cache_read_bytes"))
    order = j["time"].group_by("phase").agg(pl.col("ts").min())
    joined = both.join(order, on="phase", how="left")
    totals = pl.col("ts").min(), pl.col(SUMS).sum()
    found = joined.group_by(by).agg(totals) if by else joined.select(totals)
    share = pl.when(pl.col("device_read_bytes") + pl.col("cache_read_bytes") > 0).then(
        pl.col("device_read_bytes") / (pl.col("device_read_bytes") + pl.col("cache_read_bytes"))
    )
    first = [name for name in by if name != "phase"]
    return found.sort(*first, "ts").select(*by, *SUMS, share.alias("device_read_share"))


def find_read_source(j: JoinedTables, *phases: str) -> ReadSource | None:
    """Of these phases, or of the whole run; None where no rank has the kernel's counters."""
    table = sum_device(j, "phase")
    if not len(table):
        return None
    if phases:
        table = table.filter(pl.col("phase").is_in(phases))
    return ReadSource(int(table["device_read_bytes"].sum()), int(table["cache_read_bytes"].sum()))


def describe_reads(j: JoinedTables, *phases: str) -> str:
    """What a rate of reading is, in one sentence to be put beside it."""
    source = find_read_source(j, *phases)
    if source is None:
        return "Rates are the application's: it is not known what came from a device and what from memory."
    if source.share is None:
        return "Rates are the application's."
    shown = f"{source.share:.0%}" if source.share >= 0.01 or not source.device else "less than 1%"
    text = (
        f"Rates are the application's: {shown} of the bytes read came from a device, "
        "the others from memory (the page cache, or a file system in memory)."
    )
    unsure = list_file_systems(j).filter(pl.col("reads_are") == "not known")["type"].unique().sort()
    names = ", ".join(name for name in unsure if name)
    return text + (f" But the kernel may not count what is read of {names}." if names else "")


def list_file_systems(j: JoinedTables) -> pl.DataFrame:
    """A row per folder of the run and host: the file system that it is on.

    `reads_are` says what reads of it are: "device" if they are in the kernel's count unless they come from
    the page cache, "memory" where there is no device, "not known" where Linux may not count them.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for process in j.processes:
        for text in process.file_systems:
            if row := _read_file_system(text):
                rows[process.host, row["path"]] = {"host": process.host, **row}
    names = ("host", "folder", "path", "type", "mount", "source", "options", "stripes", "reads_are")
    return pl.DataFrame(list(rows.values()), schema=dict.fromkeys(names, pl.String))


def _read_file_system(text: str) -> dict[str, str] | None:
    """The JSON of one note, as a row of text; None if it is not one of ours."""
    try:
        value = parse_json(text.encode(errors="replace"), "file_system")
    except UserError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        return None
    names = ("folder", "path", "type", "mount", "source", "options")
    row = {name: printable(str(value.get(name, ""))) for name in names}
    kind = row["type"]
    reads = next((side for side, types in SIDES.items() if kind in types), "not known")
    return row | {"stripes": _describe_layout(value.get("layout")), "reads_are": reads}


def _describe_layout(layout: Any) -> str:
    """Lustre's components in words: 1 of 4194304 bytes up to 4194304, all of 1048576 bytes up to EOF."""
    parts = []
    for each in layout if isinstance(layout, list) else []:
        if isinstance(each, dict):
            count, size = each.get("stripe_count"), each.get("stripe_size")
            text = f"{'all targets' if count == -1 else count} x {size} bytes"
            text += f" up to {each['end']}" if "end" in each else ""
            parts.append(text + (f" in pool {each['pool']}" if "pool" in each else ""))
    return printable(", ".join(parts))


def explain_missing_counters(j: JoinedTables) -> str:
    """Why it is not known what came from devices, of ranks that should know; empty where nothing is wrong."""
    failed = [process for process in j.processes if process.io_error]
    if not failed:
        return ""
    which = f"rank {failed[0].rank}" if len(failed) == 1 else f"{len(failed)} ranks"
    return f"It is not known what came from a device and what from memory, of {which}: {failed[0].io_error}."
