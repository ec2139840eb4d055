"""TSV to a finished dataset folder, step by step, in constant memory, on any number of workers and ranks.

unpack     .gz input to plain text                                         -> *.text
count      count the rows of every piece of input                          -> count_*.json
permute    draw the shuffle: the output row of each input row              -> places_*.u32
parse      text to records, sorted by bucket, with ids numbered per lane   -> piece_*.spill, lane_*.ids
ids        map each lane's id numbers to the dataset's ids                 -> lane_*.map
translate  rewrite the records with the dataset's ids (large maps only)    -> piece_*.final
place      put each bucket's rows in order and write them                  -> results without final names
publish    md5, final names, meta.json

A piece is a range of one input file. A lane is a list of pieces that share one vocabulary. A bucket is a
range of output rows that fits in memory (see `steps/plan.py` and `io/spill.py`). Each step skips what an
earlier, killed run has finished.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, printable
from common.progress import StepProgress
from common.words import format_number
from dlrm.data.criteo import META, DatasetMeta
from dlrm.prep.io import inputs, publish
from dlrm.prep.io.columns import choose_columns
from dlrm.prep.io.files import format_bytes
from dlrm.prep.io.folders import Folders, Output, discard_files
from dlrm.prep.io.inputs import FileStamps
from dlrm.prep.io.spill import count_record_bytes
from dlrm.prep.job.options import PrepOptions
from dlrm.prep.job.workers import Workers
from dlrm.prep.steps import assign_ids, parse, permute, unpack
from dlrm.prep.steps.place import Placer, load_maps, translate_piece
from dlrm.prep.steps.plan import LAYOUT, STATE, PrepPlan
from dlrm.runtime import trace

STEPS = 8  # of the list above


def run(options: PrepOptions, workers: Workers) -> None:
    """Make the dataset of `options`; all ranks call it. Does nothing if it is there already."""
    input_files = workers.compute_on_first(lambda: inputs.find_inputs(options.input_dir, options.dataset))
    options = workers.compute_on_first(lambda: choose_columns(options, input_files))
    stamps = workers.compute_on_first(lambda: FileStamps(source.path for source in input_files))
    output = Output("run", options.output_dir, options.tmp_dir, workers.run_on_first)
    if workers.compute_on_first(lambda: is_finished(options, stamps)):
        if workers.first:
            clear_leftovers(options, output)
            print(f"{printable(options.output_dir)}: complete, made with the same parameters; nothing to do")
        return
    with output:
        names = publish.list_result_names(options, input_files)
        key = make_resume_key(options, stamps)
        folders = workers.compute_on_first(lambda: output.open(key, names, options.restart))
        meta = transform_and_publish(options, workers, input_files, stamps, folders)
        workers.run_on_first(lambda: None if options.keep_tmp else output.clear())
    if workers.first:
        print(publish.describe_dataset(options.output_dir, meta))


def make_resume_key(options: PrepOptions, stamps: FileStamps) -> dict[str, Any]:
    """Everything that intermediate files depend on: a run resumes only from files with the same key."""
    return {
        "layout": LAYOUT, "engine": options.engine, "parameters": options.list_parameters(),
        "columns": [options.columns.numerical, options.columns.categorical], "inputs": stamps.stamps,
    }  # fmt: skip


def clear_leftovers(options: PrepOptions, output: Output) -> None:
    """Remove the intermediate files of a run that was killed after it had published its results."""
    if not options.keep_tmp and output.has_leftovers():
        with contextlib.suppress(UserError), output:  # UserError: another process is writing here
            output.clear()


def transform_and_publish(
    options: PrepOptions,
    workers: Workers,
    input_files: list[inputs.InputFile],
    stamps: FileStamps,
    folders: Folders,
) -> DatasetMeta:
    """All steps, from the input files to published results. A step that an earlier run has finished in
    `folders` is skipped. `stamps`: of the input files, which must not change meanwhile.
    """
    progress = StepProgress(STEPS, workers.first, workers.size)
    plan = PrepPlan(
        options, input_files, [unpack.find_text_path(source, folders.work) for source in input_files], folders
    )
    if any(source.compressed for source in input_files):
        size = sum(
            stamp[1] for source, stamp in zip(input_files, stamps.stamps, strict=True) if source.compressed
        )
        with progress.step("unpack", bytes=size // workers.size):
            workers.run_each(input_files, lambda source: unpack.unpack_file(source, folders.work, progress))
    else:
        progress.skip_step("unpack", "no .gz files")
    workers.run_on_first(lambda: None if (plan.folder / STATE).exists() else plan.cut_input(workers.size))
    plan.read_plan()
    if not plan.file_path("publish").exists():
        transform_rows(plan, workers, stamps, progress)
    with progress.step("publish"):
        return digest_and_publish(plan, workers, stamps, progress)


def transform_rows(plan: PrepPlan, workers: Workers, stamps: FileStamps, progress: StepProgress) -> None:
    """From plain text to result files that are complete but not published: the steps count to place."""
    options, pieces = plan.options, range(len(plan.pieces))
    size = sum(piece.end - piece.begin for piece in plan.pieces) // workers.size
    with progress.step("count", bytes=size):
        workers.run_each(pieces, lambda number: parse.count_piece(plan, number, progress))
    plan.add_row_counts()
    workers.run_on_first(lambda: check_free_space(plan))
    places = plan.file_path("places", 0, "u32")
    if plan.shuffled_rows and not places.exists():
        with (
            progress.step("permute", rows=plan.shuffled_rows),
            trace.span("prep", "permute", bytes=4 * plan.shuffled_rows),
        ):
            workers.run_on_first(
                lambda: permute.write_places(places, plan.shuffled_rows, options.random_seed, progress.add)
            )
    else:
        progress.skip_step("permute", "done before" if plan.shuffled_rows else "nothing to shuffle")
    with progress.step("parse", bytes=size):
        workers.run_each(range(len(plan.lanes)), parse.LaneParser(plan, progress).parse_once)
    workers.run_on_first(lambda: stamps.refuse_changed())
    workers.run_on_first(lambda: plan.check_ranges())
    sizes = plan.load_vocab_sizes()
    if options.contiguous:
        columns = range(options.columns.categorical)
        largest_first = sorted(columns, key=lambda column: -int(sizes[:, column].sum()))
        with progress.step("ids", bytes=4 * int(sizes.sum()) // workers.size):
            workers.run_each(
                largest_first, lambda column: assign_ids.merge_column(plan, sizes, column, progress)
            )
    else:
        progress.skip_step("ids", "raw ids are kept")
    place_rows(plan, workers, sizes, progress)


def place_rows(plan: PrepPlan, workers: Workers, sizes: np.ndarray, progress: StepProgress) -> None:
    """The steps translate and place. `sizes`: int64 [lanes, columns], distinct ids."""
    options, maps = plan.options, None
    if not options.contiguous or 4 * int(sizes.sum()) <= options.map_bytes:
        progress.skip_step(
            "translate", "done while rows are placed" if options.contiguous else "raw ids are kept"
        )
        maps = load_maps(plan, sizes) if options.contiguous else None
    else:
        pairs = [(lane, piece) for lane, pieces in enumerate(plan.lanes) for piece in pieces]
        with progress.step("translate", rows=plan.rows // workers.size):
            workers.run_each(pairs, lambda pair: translate_piece(plan, sizes, *pair, progress))
    workers.run_on_first(lambda: PREPARE_RESULTS[options.format](plan))
    placer = PLACERS[options.format]()(plan, maps, progress)
    with progress.step("place", rows=plan.rows // workers.size):
        order = interleave_ranges(plan.bucket_count, workers.size * workers.per_rank)
        workers.run_each(order, placer.place_bucket, placer.close)


def interleave_ranges(count: int, workers: int) -> list[int]:
    """The numbers below `count`, ordered so that workers that take turns work in ranges far from each other:
    then they mostly write to different files.
    """
    length = -(-count // workers)
    turns = (worker * length + turn for turn in range(length) for worker in range(workers))
    return [number for number in turns if number < count]


def allocate_results(plan: PrepPlan) -> None:
    if publish.allocate_arrays(plan.folders.unfinished, plan.options, plan.outputs):
        discard_files(plan.folder, "bucket_*.done")  # their rows were in files that had to be made again


def make_parquet_folders(plan: PrepPlan) -> None:
    from dlrm.prep.steps.place_parquet import make_folders  # pyarrow takes a while to import

    make_folders(plan)


def load_parquet_placer() -> type[Placer]:
    from dlrm.prep.steps.place_parquet import ParquetPlacer

    return ParquetPlacer


def list_parquet_names(plan: PrepPlan) -> list[str]:
    from dlrm.prep.steps.place_parquet import list_names, write_sizes

    write_sizes(plan, publish.compute_table_sizes(plan.find_last_ids(), plan.options))
    return list_names(plan)


PREPARE_RESULTS = {"npy": allocate_results, "parquet": make_parquet_folders}
PLACERS = {"npy": lambda: Placer, "parquet": load_parquet_placer}
LIST_NAMES = {
    "npy": lambda plan: list(publish.list_arrays(plan.outputs, plan.options)),
    "parquet": list_parquet_names,
}


def check_free_space(plan: PrepPlan) -> None:
    """UserError where the disk cannot hold the results and the intermediate files."""
    options = plan.options
    result_bytes = sum(
        publish.HEADER_BYTES + shape[0] * shape[1] * np.dtype(dtype).itemsize
        for shape, dtype in publish.list_arrays(plan.outputs, options).values()
    )
    # the permutation needs 4 bytes a row, and at most 20 for its messages and pairs
    work_bytes = plan.rows * count_record_bytes(options.columns) + plan.shuffled_rows * 24
    needs = [([plan.folders.unfinished], result_bytes), ([plan.folder], work_bytes)]
    if os.stat(plan.folders.unfinished).st_dev == os.stat(plan.folder).st_dev:
        needs = [([plan.folders.unfinished, plan.folder], result_bytes + work_bytes)]
    for folders, need in needs:
        present = sum(
            entry.stat().st_blocks * 512
            for folder in folders
            for entry in folder.rglob("*")
            if entry.is_file()
        )
        free = shutil.disk_usage(folders[0]).free
        if free + present < need:
            where = options.output_dir if folders[0] == plan.folders.unfinished else plan.folder.parent
            raise UserError(
                f"{printable(where)}: {format_bytes(need - present)} needed, {format_bytes(free)} free: "
                "free some space, or give another --output_dir or --tmp_dir"
            )


def record_results(plan: PrepPlan) -> None:
    """Once all rows are in place: save what there is to publish, so that a resumed run starts from here."""
    if not plan.file_path("publish").exists():
        discard_files(plan.folder, "md5_*.json")
        values = {
            "rows": [output.rows for output in inputs.select_days(plan.outputs)],
            "last": plan.find_last_ids(),
            "files": LIST_NAMES[plan.options.format](plan),
            "skipped": plan.list_skipped_rows(),
        }
        plan.save_json(plan.file_path("publish"), values)


def digest_and_publish(
    plan: PrepPlan, workers: Workers, stamps: FileStamps, progress: StepProgress
) -> DatasetMeta:
    """Flush and digest the results on all ranks, then publish them on rank 0."""
    workers.run_on_first(lambda: record_results(plan))
    names = plan.load_json(plan.file_path("publish"))["files"]
    # Each node flushes its own writes to disk; meanwhile the digests are computed and spill files removed.
    with trace.make_named_pool(2, "flush and tidy") as pool:
        synced = pool.submit(publish.sync_files, plan.folders, names)
        if workers.first and not plan.options.keep_tmp:
            pool.submit(plan.discard_spills)
        write_digests(plan, workers, names)
    workers.raise_shared_error(synced.exception())
    return workers.compute_on_first(lambda: publish_with_meta(plan, stamps, progress))


def load_digests(plan: PrepPlan) -> dict[str, str]:
    """File name -> md5, for all files digested so far, by any rank or an earlier run."""
    return {
        name: md5 for path in plan.folder.glob("md5_*.json") for name, md5 in plan.load_json(path).items()
    }


def write_digests(plan: PrepPlan, workers: Workers, names: list[str]) -> None:
    """Compute the md5 of every result: one group of files per worker of each rank, largest files first."""
    if not plan.options.md5:
        return
    done = workers.all_gather(sorted(load_digests(plan)))[0]
    numbers = [number for number, name in enumerate(names) if name not in done]
    numbers.sort(key=lambda number: -plan.folders.find_result(names[number]).stat().st_size)
    count = workers.size * workers.per_rank
    groups = [group for group in (numbers[first::count] for first in range(count)) if group]

    def digest_group(group: list[int]) -> None:
        digests = publish.compute_md5(plan.folders, [names[number] for number in group])
        plan.save_json(plan.file_path("md5", group[0]), digests)

    workers.run_each(groups, digest_group, in_threads=True)  # hashlib leaves the lock, and files are flushed


def publish_with_meta(plan: PrepPlan, stamps: FileStamps, progress: StepProgress) -> DatasetMeta:
    """Rank 0: write meta.json from what the ranks have recorded, and give all results their names."""
    options, values = plan.options, plan.load_json(plan.file_path("publish"))
    for count, example in values["skipped"]:
        progress.print_line(f"skipped {format_number(count, 'bad row')}, the first: {example}")
    meta = publish.make_meta(options, values["rows"], values["last"], inputs=stamps.list_recorded())
    if options.md5:
        digests = load_digests(plan)
        meta.md5.update({name: digests[name] for name in values["files"]})
    publish.publish_files(plan.folders, values["files"] + publish.WITHOUT_MD5[options.format], meta, stamps)
    return meta


def is_finished(options: PrepOptions, stamps: FileStamps) -> bool:
    """Whether the output is complete and was made from the same input with the same parameters."""
    if options.restart or not (Path(options.output_dir) / META).exists():
        return False
    try:
        meta = DatasetMeta.load(options.output_dir)
    except UserError:
        return False
    parameters = dict(meta.parameters)
    recorded, wanted = parameters.pop("inputs", None), json.loads(json.dumps(options.list_parameters()))
    if (
        parameters != wanted
        or meta.columns != options.columns
        or not isinstance(recorded, list)
        or not all(isinstance(stamp, list) for stamp in recorded)
    ):
        return False
    present = stamps.list_recorded()
    same = len(recorded) == len(present) and all(
        # earlier versions recorded path, size and time without the inode
        len(old) >= 3 and old == new[: len(old)]
        for old, new in zip(recorded, present, strict=False)
    )
    return same and all((options.output_dir / name).exists() for name in meta.md5)
