"""TSV to a finished dataset folder, step by step, in constant memory, on any number of threads and ranks.

count      rows of every piece of input                            -> count_*.json
permute    where the shuffle puts each row                         -> places.u32
parse      text to records on their way to their bucket, local ids -> piece_*.spill, lane_*.ids
ids        the lanes' ids to the dataset's                         -> lane_*.map
translate  records with the dataset's ids, when the maps are large -> piece_*.final
place      buckets in order                                        -> results not yet named
publish    real names, md5, meta.json
"""

import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, printable
from dlrm.data.criteo import META, NUM_SPARSE, DatasetMeta
from dlrm.prep.io import inputs as sources
from dlrm.prep.io import publish
from dlrm.prep.io.files import size_text
from dlrm.prep.io.folders import Folders, Output, discard
from dlrm.prep.io.inputs import Stamps
from dlrm.prep.io.spill import RECORD_BYTES
from dlrm.prep.job.options import PrepOptions
from dlrm.prep.job.progress import PrepProgress
from dlrm.prep.job.workers import Workers
from dlrm.prep.steps import assign_ids, parse, permute, unpack
from dlrm.prep.steps.place import Placer, load_maps, translate_piece
from dlrm.prep.steps.plan import LAYOUT, STATE, PrepPlan
from dlrm.runtime import trace

STEPS = 8


def run(options: PrepOptions, team: Workers) -> None:
    found = team.first_gives(lambda: sources.find_inputs(options.input_dir, options.dataset))
    stamps = team.first_gives(lambda: Stamps(source.path for source in found))
    output = Output("run", options.output_dir, options.tmp_dir, team.first_does)
    if team.first_gives(lambda: is_finished(options, stamps)):
        if team.first:
            clear_left_behind(options, output)
            print(f"{printable(options.output_dir)}: complete, made with the same parameters; nothing to do")
        return
    with output:
        names = publish.names_to_come(options, found)
        key = key_of(options, stamps)
        folders = team.first_gives(lambda: output.open(key, names, options.restart))
        transform_and_publish(options, team, found, stamps, folders)
        team.first_does(lambda: None if options.keep_tmp else output.clear())


def key_of(options: PrepOptions, stamps: Stamps) -> dict[str, Any]:
    """What intermediate files were made with: others are not gone on with."""
    return {
        "layout": LAYOUT, "engine": options.engine, "parameters": options.parameters(),
        "inputs": stamps.taken,
    }  # fmt: skip


def clear_left_behind(options: PrepOptions, output: Output) -> None:
    """Of a run that was killed between its last word and its end; not where another one is at work."""
    if not options.keep_tmp and output.left_behind():
        with contextlib.suppress(UserError), output:
            output.clear()


def transform_and_publish(
    options: PrepOptions, team: Workers, found: list[sources.InputFile], stamps: Stamps, folders: Folders
) -> None:
    progress = PrepProgress(STEPS, team.first, team.size)
    work = PrepPlan(options, found, [unpack.text_path(source, folders.work) for source in found], folders)
    if any(source.packed for source in found):
        size = sum(taken[1] for source, taken in zip(found, stamps.taken, strict=True) if source.packed)
        with progress.step("unpack", bytes=size // team.size):
            team.each(found, lambda source: unpack.unpack_file(source, folders.work, progress))
    else:
        progress.skip("unpack", "no .gz files")
    team.first_does(lambda: None if (work.folder / STATE).exists() else work.cut(team.size))
    work.read_plan()
    if not work.path("publish").exists():
        transform_rows(work, team, stamps, progress)
    with progress.step("publish"):
        publish_dataset(work, team, stamps, progress)


def transform_rows(work: PrepPlan, team: Workers, stamps: Stamps, progress: PrepProgress) -> None:
    """Everything between the text and the finished, not yet published, files."""
    options, pieces = work.options, range(len(work.pieces))
    size = sum(piece.end - piece.begin for piece in work.pieces) // team.size
    with progress.step("count", bytes=size):
        team.each(pieces, lambda number: parse.count_piece(work, number, progress))
    work.counted()
    team.first_does(lambda: check_space(work))
    places = work.path("places", 0, "u32")
    if work.moved and not places.exists():
        with progress.step("permute", rows=work.moved), trace.span("prep", "permute", bytes=4 * work.moved):
            team.first_does(
                lambda: permute.write_places(places, work.moved, options.random_seed, progress.add)
            )
    else:
        progress.skip("permute", "done before" if work.moved else "nothing to shuffle")
    with progress.step("parse", bytes=size):
        team.each(range(len(work.lanes)), parse.LaneParser(work, progress).lane)
    team.first_does(lambda: stamps.check())
    team.first_does(lambda: work.check_ranges())
    sizes = work.vocab_sizes()
    if options.contiguous:
        largest_first = sorted(range(NUM_SPARSE), key=lambda column: -int(sizes[:, column].sum()))
        with progress.step("ids", bytes=4 * int(sizes.sum()) // team.size):
            team.each(largest_first, lambda column: assign_ids.merge_column(work, sizes, column, progress))
    else:
        progress.skip("ids", "raw ids are kept")
    place_rows(work, team, sizes, progress)


def place_rows(work: PrepPlan, team: Workers, sizes: np.ndarray, progress: PrepProgress) -> None:
    options, maps = work.options, None
    if not options.contiguous or 4 * int(sizes.sum()) <= options.map_bytes:
        progress.skip("translate", "done while rows are placed" if options.contiguous else "raw ids are kept")
        maps = load_maps(work, sizes) if options.contiguous else None
    else:
        owners = [(lane, number) for lane, numbers in enumerate(work.lanes) for number in numbers]
        with progress.step("translate", rows=work.rows // team.size):
            team.each(owners, lambda owner: translate_piece(work, sizes, *owner, progress))
    team.first_does(lambda: MAKE[options.format](work))
    placer = PLACERS[options.format]()(work, maps, progress)
    with progress.step("place", rows=work.rows // team.size):
        team.each(spread_apart(work.bucket_count, team.size * team.workers), placer.bucket)
        placer.close()


def spread_apart(count: int, workers: int) -> list[int]:
    """Numbers in such an order that workers who take turns are in different stretches: of different files."""
    stretch = -(-count // workers)
    turns = (worker * stretch + turn for turn in range(stretch) for worker in range(workers))
    return [number for number in turns if number < count]


def make_files(work: PrepPlan) -> None:
    if publish.allocate(work.folders.made, work.options, work.made):
        discard(work.folder, "bucket_*.done")


def make_parquet(work: PrepPlan) -> None:
    from dlrm.prep.steps.place_parquet import make_folders  # pyarrow takes a while to import

    make_folders(work)


def parquet_placer() -> type[Placer]:
    from dlrm.prep.steps.place_parquet import ParquetPlacer

    return ParquetPlacer


def parquet_names(work: PrepPlan) -> list[str]:
    from dlrm.prep.steps.place_parquet import list_names, write_sizes

    sizes = work.kept() if work.options.mod_idx else publish.sizes_of_tables(work.last_ids(), work.options)
    write_sizes(work, sizes)
    return list_names(work)


MAKE = {"npy": make_files, "parquet": make_parquet}
PLACERS = {"npy": lambda: Placer, "parquet": parquet_placer}
EXTRA = {"npy": [], "parquet": ["README.md"]}  # without a digest
NAMES = {"npy": lambda work: list(publish.list_arrays(work.made, work.options)), "parquet": parquet_names}


def check_space(work: PrepPlan) -> None:
    """Refuse to begin what the disk cannot hold."""
    options = work.options
    out = sum(
        publish.HEADER_BYTES + shape[0] * shape[1] * np.dtype(dtype).itemsize
        for shape, dtype in publish.list_arrays(work.made, options).values()
    )
    spilled = work.rows * RECORD_BYTES + work.moved * 24
    needs = [([work.folders.made], out), ([work.folder], spilled)]
    if os.stat(work.folders.made).st_dev == os.stat(work.folder).st_dev:
        needs = [([work.folders.made, work.folder], out + spilled)]
    for folders, need in needs:
        there = sum(
            entry.stat().st_blocks * 512
            for folder in folders
            for entry in folder.rglob("*")
            if entry.is_file()
        )
        free = shutil.disk_usage(folders[0]).free
        if free + there < need:
            where = options.output_dir if folders[0] == work.folders.made else work.folder.parent
            raise UserError(
                f"{printable(where)}: {size_text(need - there)} needed, {size_text(free)} free: make room, "
                "or name another --output_dir or --tmp_dir"
            )


def record_names(work: PrepPlan) -> None:
    """All rows are in place: what there is to publish."""
    if not work.path("publish").exists():
        discard(work.folder, "md5_*.json")
        values = {"rows": [output.rows for output in sources.days_of(work.made)], "last": work.last_ids(),
                  "files": NAMES[work.options.format](work), "skipped": work.skipped()}  # fmt: skip
        work.save(work.path("publish"), values)


def publish_dataset(work: PrepPlan, team: Workers, stamps: Stamps, progress: PrepProgress) -> None:
    team.first_does(lambda: record_names(work))
    names = work.load(work.path("publish"))["files"]
    with ThreadPoolExecutor(2) as pool:  # each machine writes back what it wrote while digests are made
        written = pool.submit(publish.sync_files, work.folders, names)
        if team.first and not work.options.keep_tmp:
            pool.submit(work.discard)
        digest(work, team, names)
    team.agree(written.exception())
    team.first_does(lambda: finish(work, stamps, progress))


def digests_so_far(work: PrepPlan) -> dict[str, str]:
    return {name: md5 for path in work.folder.glob("md5_*.json") for name, md5 in work.load(path).items()}


def digest(work: PrepPlan, team: Workers, names: list[str]) -> None:
    """md5 of every file; a group of files for every thread of every rank."""
    if not work.options.md5:
        return
    done = team.gather(sorted(digests_so_far(work)))[0]
    numbers = [number for number, name in enumerate(names) if name not in done]
    numbers.sort(key=lambda number: -work.folders.result(names[number]).stat().st_size)
    parts = team.size * team.workers
    groups = [group for group in (numbers[part::parts] for part in range(parts)) if group]

    def one(group: list[int]) -> None:
        found = publish.md5_of(work.folders, [names[number] for number in group])
        work.save(work.path("md5", group[0]), found)

    team.each(groups, one)


def finish(work: PrepPlan, stamps: Stamps, progress: PrepProgress) -> None:
    options, values = work.options, work.load(work.path("publish"))
    for count, example in values["skipped"]:
        progress.say(f"skipped {count} bad rows, the first: {example}")
    meta = publish.make_meta(options, values["rows"], values["last"], inputs=stamps.recorded())
    if options.md5:
        found = digests_so_far(work)
        meta.md5.update({name: found[name] for name in values["files"]})
    publish.publish(work.folders, values["files"] + EXTRA[options.format], meta, stamps)
    print(publish.summarize(options.output_dir, meta))


def is_finished(options: PrepOptions, stamps: Stamps) -> bool:
    """Whether the output is complete and was made from the same input with the same parameters."""
    if options.restart or not (Path(options.output_dir) / META).exists():
        return False
    try:
        meta = DatasetMeta.load(options.output_dir)
    except UserError:
        return False
    parameters = dict(meta.parameters)
    inputs, wanted = parameters.pop("inputs", None), json.loads(json.dumps(options.parameters()))
    if (
        parameters != wanted
        or not isinstance(inputs, list)
        or not all(isinstance(each, list) for each in inputs)
    ):
        return False
    found = stamps.recorded()  # without the inode in what earlier versions wrote
    same = len(inputs) == len(found) and all(
        len(old) >= 3 and old == new[: len(old)] for old, new in zip(inputs, found, strict=False)
    )
    return same and all((options.output_dir / name).exists() for name in meta.md5)
