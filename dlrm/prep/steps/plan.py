"""The plan of a run: how the input is divided, and the intermediate files that say what is done.

Each part of the work writes a file, which gets its name when it is complete. A part is done if its file
exists.
"""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, printable
from dlrm.prep.io.blocks import InputPiece, find_line_end
from dlrm.prep.io.files import OffsetFile, read_json_file, write_atomically
from dlrm.prep.io.folders import Folders, discard_files
from dlrm.prep.io.inputs import InputFile, OutputDay, count_shuffled_rows, plan_outputs
from dlrm.prep.io.spill import choose_bucket_bits, count_buckets
from dlrm.prep.job.options import PrepOptions

STATE = "state.json"
SMALLEST, LARGEST = 1 << 20, 512 << 20  # bytes of text in a lane
# lanes per thread; a lane starts with an empty vocabulary, so more would cost more than they balance
PER_WORKER = 2
LAYOUT = 4  # version of the intermediate files: a run does not resume from another version


class PrepPlan:
    """How the input is divided, and the paths and contents of the intermediate files.

    A piece is a byte range of one input file. A lane is a list of consecutive pieces that one thread parses
    with one vocabulary; lanes are of similar size. `texts`: for each input file the plain text to read.
    `rows`, `shuffled_rows`, `outputs` and `bits` (buckets have 2^bits rows) are known after `add_row_counts`.
    """

    def __init__(
        self, options: PrepOptions, found: list[InputFile], texts: list[Path], folders: Folders
    ) -> None:
        """found: the input files, in order. folders: where work files and results go."""
        self.options, self.sources, self.texts, self.folders = options, found, texts, folders
        self.folder = folders.work
        self.pieces: list[InputPiece] = []
        self.lanes: list[list[int]] = []
        self.outputs: list[OutputDay] = []
        self.shuffled_rows = self.rows = self.bits = 0

    # --- intermediate files

    def file_path(self, kind: str, number: int = 0, ending: str = "json") -> Path:
        """An intermediate file: e.g. ("lane", 3, "ids") is lane_00003.ids in the work folder."""
        return self.folder / f"{kind}_{number:05d}.{ending}"

    def load_json(self, path: Path) -> Any:
        return read_json_file(path)

    def save_json(self, path: Path, value: Any) -> None:
        write_atomically(path, value)

    # --- how the input is divided

    def discard_spills(self) -> None:
        """Remove the spill files, once all rows are in place. They are large: it takes a while."""
        discard_files(self.folder, "piece_*")

    def cut_input(self, ranks: int) -> None:
        """Divide the input into lanes of similar size, at line ends, and save the plan. A lane has one piece
        of each input file that it contains text of.
        """
        sizes = [text.stat().st_size for text in self.texts]
        for source, size in zip(self.sources, sizes, strict=True):
            if size == 0:
                raise UserError(f"{printable(source.path)}: empty, it has no rows")
        whole = sum(sizes)
        workers = ranks * self.options.workers
        share = whole if workers == 1 else whole // (workers * PER_WORKER)
        target = self.options.part_bytes or min(LARGEST, max(SMALLEST, share))
        lanes = max(1, round(whole / target))
        marks = [whole * lane // lanes for lane in range(1, lanes + 1)]
        pieces, lane_pieces = [], [[] for _ in range(lanes)]
        before = lane = 0
        for source, (text, size) in enumerate(zip(self.texts, sizes, strict=True)):
            at = 0
            with OffsetFile(text) as file:
                while at < size:
                    while marks[lane] <= before + at:
                        lane += 1
                    end = find_line_end(file, marks[lane] - before, size)
                    lane_pieces[lane].append(len(pieces))
                    pieces.append([source, at, end])
                    at = end
            before += size
        self.save_json(
            self.folder / STATE,
            {"pieces": pieces, "lanes": [numbers for numbers in lane_pieces if numbers]},
        )

    def read_plan(self) -> None:
        state = self.load_json(self.folder / STATE)
        self.pieces = [InputPiece(*piece) for piece in state["pieces"]]
        self.lanes = state["lanes"]

    def add_row_counts(self) -> None:
        """Once all pieces are counted: set each piece's first row and line, and the shape of the output."""
        rows_of = [0] * len(self.sources)
        lines_of = [0] * len(self.sources)
        for number, piece in enumerate(self.pieces):
            rows, lines = self.load_json(self.file_path("count", number))
            piece.first_line, piece.first_row, piece.rows = lines_of[piece.source], self.rows, rows
            self.rows += rows
            rows_of[piece.source] += rows
            lines_of[piece.source] += lines
        for source, rows in zip(self.sources, rows_of, strict=True):
            if rows == 0:
                raise UserError(f"{printable(source.path)}: no rows in it")
        self.set_outputs(plan_outputs(self.sources, rows_of, self.options.steps))

    def set_outputs(self, outputs: list[OutputDay]) -> None:
        self.outputs = outputs
        self.rows = sum(output.rows for output in outputs)
        self.shuffled_rows = count_shuffled_rows(self.outputs, self.options.shuffle)
        self.bits = choose_bucket_bits(self.rows, self.options.columns)

    @property
    def bucket_count(self) -> int:
        return count_buckets(self.rows, self.bits)

    # --- results of parsing

    def load_vocab_sizes(self) -> np.ndarray:
        """int64 [lanes, columns]: distinct ids of each lane and column."""
        sizes = [self.load_json(self.file_path("lane", lane))["vocab"] for lane in range(len(self.lanes))]
        return np.array(sizes, np.int64).reshape(len(self.lanes), self.options.columns.categorical)

    def load_lane_infos(self) -> list[dict[str, Any]]:
        return [self.load_json(self.file_path("lane", lane)) for lane in range(len(self.lanes))]

    def find_dense_ranges(self) -> list[tuple[int, int]]:
        """(smallest, largest) count of each input file."""
        low, high = [1 << 40] * len(self.sources), [-(1 << 40)] * len(self.sources)
        for pieces, info in zip(self.lanes, self.load_lane_infos(), strict=True):
            for piece, (least, most) in zip(pieces, info["dense"], strict=True):
                source = self.pieces[piece].source
                low[source], high[source] = min(low[source], least), max(high[source], most)
        return list(zip(low, high, strict=True))

    def check_ranges(self) -> None:
        for source, (low, high) in zip(self.sources, self.find_dense_ranges(), strict=True):
            self.options.check_counts(source.path, low, high)

    def find_log_shifts(self) -> list[int]:
        """For each input file, the number to subtract from its counts before the logarithm: torchrec's min -
        2, in int32 arithmetic.
        """
        return [self.options.log_shift(low) for low, _ in self.find_dense_ranges()]

    def count_kept_ids(self) -> list[int]:
        """For each column, how many ids are not mapped to the id for rare ones."""
        columns = range(self.options.columns.categorical)
        return [self.load_json(self.file_path("column", column))["kept"] for column in columns]

    def find_last_ids(self) -> list[int]:
        """The largest id of each column."""
        if self.options.contiguous:
            if self.options.mod_idx:  # what a reader makes of them: rows of tables, from 0
                return [count - 1 for count in self.count_kept_ids()]
            return [1 + count for count in self.count_kept_ids()]
        return np.max([info["last"] for info in self.load_lane_infos()], axis=0).tolist()

    def list_skipped_rows(self) -> list[list[Any]]:
        """[count, message of the first] for each piece with skipped rows."""
        return [found for info in self.load_lane_infos() for found in info["skipped"]]
