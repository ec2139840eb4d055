"""Reports of many ranks: which of them are shown one by one, the nodes that they ran on, rows of heat maps.

In: the tables of the ranks. Out: the ranks that stand for all (the slowest and a typical one), a row per
node, and shares of time by rank and stretch of time. The full tables are in tables/*.csv.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from analysis.report.facts import Facts
from analysis.tables.answers import PARTS
from analysis.tables.gather import JoinedTables
from common.words import format_number

MANY_RANKS = 16  # up to this number the page shows each rank; of more it shows those that stand for all
LISTED_RANKS = 64  # up to this number summary.json lists each rank
LISTED_NODES = 64
SLOWEST = 5
HEAT_ROWS, HEAT_COLUMNS = 256, 150  # of a heat map, at most


@dataclass(frozen=True)
class ChosenRanks:
    """The ranks that stand for all: the slowest, the slowest of them first, and a typical one."""

    slowest: tuple[int, ...]
    typical: int
    ranks: int  # how many there are
    hosts: Mapping[int, str] = field(default_factory=dict)

    @property
    def chosen(self) -> list[int]:
        return [*self.slowest, self.typical]

    def show(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows that the page shows: all, or of too many ranks those of the chosen ones, the slowest
        first, with their hosts.
        """
        if self.ranks <= MANY_RANKS:
            return table
        places = {rank: place for place, rank in enumerate(self.chosen)}
        place = pl.col("rank").replace_strict(places, default=None, return_dtype=pl.Int32)
        rows = table.filter(pl.col("rank").is_in(self.chosen)).sort(place, maintain_order=True)
        host = pl.col("rank").replace_strict(dict(self.hosts), default="", return_dtype=pl.String)
        at = rows.columns.index("rank") + 1
        return rows.insert_column(at, rows.select(host.alias("host")).to_series())

    def list_rows(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows that summary.json lists: all, or of too many ranks those of the chosen ones."""
        return table.filter(pl.col("rank").is_in(self.chosen)) if self.ranks > LISTED_RANKS else table

    def name_rank(self, rank: int) -> str:
        return f"typical: {rank}" if self.ranks > MANY_RANKS and rank == self.typical else f"rank {rank}"

    def describe(self) -> str:
        """What a figure or table of them shows; empty where it shows all ranks."""
        if self.ranks <= MANY_RANKS:
            return ""
        slow = ", ".join(self._describe_place(rank) for rank in self.slowest)
        return (
            f" Of {self.ranks:,} ranks the {format_number(len(self.slowest), 'slowest one')} "
            f"({slow}) and a typical one ({self._describe_place(self.typical)}); all are in tables/."
        )

    def _describe_place(self, rank: int) -> str:
        host = self.hosts.get(rank, "")
        return f"{rank} on {host}" if host else str(rank)


def find_hosts(j: JoinedTables) -> dict[int, str]:
    """The host of each rank; of a rank that moved between launches the last one."""
    return {process.rank: process.host for process in j.processes}


def measure_ranks(facts: Facts) -> pl.DataFrame:
    """rank, own_s: what makes the others wait, the slowest rank first.

    Its steps without communication; where there are no steps, the time that it ran.
    """
    if len(facts.ranks):
        found = facts.ranks.select("rank", (pl.col("wall_s") - pl.col("communication_s")).alias("own_s"))
    else:
        found = facts.breakdown.select("rank", pl.col("wall").alias("own_s"))
    return found.sort("own_s", "rank", descending=[True, False])


def choose_ranks(facts: Facts) -> ChosenRanks:
    """The typical rank is the one in the middle."""
    order = measure_ranks(facts)["rank"].to_list()
    slowest = order[: min(SLOWEST, max(0, len(order) - 1))]
    typical = order[max(len(slowest), len(order) // 2)]
    return ChosenRanks(tuple(slowest), typical, facts.breakdown.height, find_hosts(facts.joined))


def sum_nodes(facts: Facts) -> pl.DataFrame:
    """A row per node, that with the slowest rank first: its ranks, what they do in their steps without
    communication, and the mean of their times by part.
    """
    hosts = find_hosts(facts.joined)
    table = facts.breakdown.join(measure_ranks(facts), on="rank", how="left").with_columns(
        pl.col("rank").replace_strict(hosts, default="", return_dtype=pl.String).alias("host")
    )
    found = table.group_by("host").agg(
        pl.len().alias("ranks"), pl.col("rank").min().alias("first_rank"),
        pl.col("rank").sort_by("own_s", "rank", nulls_last=False).last().alias("slowest_rank"),
        pl.col("own_s").max().alias("slowest_own_s"), pl.col("own_s").mean().alias("own_s"),
        *(pl.col(part).mean().alias(f"{part}_s") for part in ("wall", *PARTS)),
    )  # fmt: skip
    return found.sort("slowest_own_s", "first_rank", descending=[True, False], nulls_last=True)


@dataclass(frozen=True)
class HeatRow:
    """Ranks that share a row of a heat map, and what it is called."""

    label: str
    ranks: tuple[int, ...]


def group_heat_rows(ranks: Iterable[int], hosts: Mapping[int, str]) -> list[HeatRow]:
    """A row per rank, sorted by node; of too many ranks for that, a row for several of one node, or for all
    of some nodes.
    """
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts.get(rank, ""), []).append(rank)
    total = sum(map(len, by_host.values()))
    if total <= HEAT_ROWS:
        return [
            HeatRow(f"rank {rank}" + (f" {_shorten(host)}" if total > MANY_RANKS else ""), (rank,))
            for host, own in by_host.items()
            for rank in own
        ]
    least = -(-total // HEAT_ROWS)
    rows: list[HeatRow] = []
    names: list[str] = []
    waiting: list[int] = []  # ranks of nodes that are too small for a row of their own
    for host, own in by_host.items():
        parts = max(1, len(own) // least)
        for part in np.array_split(own, parts):
            names, waiting = [*names, host], [*waiting, *part.tolist()]
            if len(waiting) >= least:
                rows.append(_name_row(names, waiting))
                names, waiting = [], []
    if waiting:
        rows.append(_name_row(names, waiting))
    return rows


def _name_row(hosts: list[str], ranks: list[int]) -> HeatRow:
    first, last = _shorten(hosts[0]), _shorten(hosts[-1])
    where = first if first == last else f"{first} to {last}"
    together = max(ranks) - min(ranks) + 1 == len(ranks)
    which = f"{min(ranks)}-{max(ranks)}" if together else format_number(len(ranks), "rank")
    return HeatRow(f"{which} {where}".rstrip(), tuple(ranks))


def _shorten(host: str) -> str:
    """Without its domain."""
    return host.split(".")[0][:24]


@dataclass(frozen=True)
class Heat:
    """Values (float64 [rows, columns]) by row and stretch of time; times in us."""

    rows: list[HeatRow]
    begin_us: int
    width_us: int
    values: np.ndarray


def make_share_heat(j: JoinedTables, *kinds: str) -> Heat | None:
    """Per cent of the main thread's time that is of these kinds (columns of the table busy); of several ranks
    in a row, of the one with most.
    """
    busy = j["busy"]
    if not len(busy):
        return None
    rows = group_heat_rows(busy["rank"].unique().to_list(), find_hosts(j))
    width = int(busy["width_us"].to_numpy().max())
    sums = busy.select("rank", "bin", "wall_us", pl.sum_horizontal(kinds).alias("amount"))
    first, step, columns = _choose_columns(sums)
    number = _number_rows(rows)
    cells = (
        sums.join(number, on="rank")
        .group_by("row", "rank", ((pl.col("bin") - first) // step).alias("column"))
        .agg(pl.col("wall_us", "amount").sum())
        .filter(pl.col("wall_us") > 0)
        .group_by("row", "column")
        .agg((100 * pl.col("amount") / pl.col("wall_us")).max().alias("value"))
    )
    return Heat(rows, first * width, width * step, _fill(cells, len(rows), columns))


def make_rate_heat(j: JoinedTables) -> Heat | None:
    """MB/s that a rank reads and writes; of several ranks in a row their mean."""
    rates = j["rates"]
    if not len(rates):
        return None
    rows = group_heat_rows(rates["rank"].unique().to_list(), find_hosts(j))
    width = int(rates["width_us"][0])
    first, step, columns = _choose_columns(rates)
    sizes = pl.DataFrame(
        {"row": range(len(rows)), "ranks": [len(row.ranks) for row in rows]},
        schema_overrides={"row": pl.Int32},
    )
    cells = (
        rates.select("rank", "bin", "bytes").join(_number_rows(rows), on="rank")
        .group_by("row", ((pl.col("bin") - first) // step).alias("column"))
        .agg(pl.col("bytes").sum())
        .join(sizes, on="row")
        .select("row", "column", (pl.col("bytes") / (width * step) / pl.col("ranks")).alias("value"))
    )  # fmt: skip
    return Heat(rows, first * width, width * step, _fill(cells, len(rows), columns))


def _choose_columns(table: pl.DataFrame) -> tuple[int, int, int]:
    """The first bin, how many bins a column has, and the number of columns."""
    bins = table["bin"].to_numpy()
    first, last = int(bins.min()), int(bins.max())
    step = max(1, math.ceil((last - first + 1) / HEAT_COLUMNS))
    return first, step, (last - first) // step + 1


def _number_rows(rows: list[HeatRow]) -> pl.DataFrame:
    pairs = [(number, rank) for number, row in enumerate(rows) for rank in row.ranks]
    return pl.DataFrame(pairs, schema={"row": pl.Int32, "rank": pl.Int32}, orient="row")


def _fill(cells: pl.DataFrame, rows: int, columns: int) -> np.ndarray:
    values = np.zeros((rows, columns))
    values[cells["row"].to_numpy(), cells["column"].to_numpy()] = cells["value"].to_numpy()
    return values


def group_file_systems(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of `device.list_file_systems`; hosts that have the same one share a row."""
    same = [name for name in table.columns if name != "host"]
    grouped = table.group_by(same, maintain_order=True).agg(pl.col("host").first(), pl.len().alias("hosts"))
    more = pl.format("{} and {} more", "host", pl.col("hosts") - 1)
    name = pl.when(pl.col("hosts") > 1).then(more).otherwise("host").alias("host")
    return grouped.select(name, *same)
