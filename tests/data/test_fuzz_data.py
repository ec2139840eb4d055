"""Damaged and hostile bytes in what training, the benchmark and the preprocessing tools read of datasets.

Each case is a fork of `CASES` that calls the reading code itself, with the commands' own handling of errors.
Bytes are damaged at random, and fields that ask for memory or for a loop are set to what would hurt.
"""

import json
import os
import random
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.case_server import CaseServer
from support.data_folder import rows as make_rows
from support.data_folder import write_days
from support.fuzzing import Outcome, check, mutate, outcome

from dlrm.config.parser import parse_options
from dlrm.data.batches import BatchLoader
from dlrm.data.collate import BatchCollator
from dlrm.data.criteo import DatasetMeta, choose_table_sizes
from dlrm.data.readers import open_source, scan_dataset
from dlrm.models.bert4rec import cache, ratings, sequences
from dlrm.models.bert4rec import dataloaders as bert_dataloaders
from dlrm.models.bert4rec.dataset_files import find_ratings_file
from dlrm.models.bert4rec.options import BertConfig
from dlrm.models.dlrm import build
from dlrm.models.dlrm.build import assemble_model
from dlrm.models.dlrm.options import Config
from dlrm.prep.__main__ import main as prep_main
from dlrm.runtime import entry
from dlrm.runtime.ranks import Ranks

CASES = CaseServer(__file__)
Read = Callable[[list[str]], int]
HUGE = (
    0, 1, 3, 25, 27, 99, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 47, 1 << 48, 1 << 60,
    (1 << 63) - 1, 1 << 63, 10**18, 10**30,
)  # fmt: skip
STRANGE: list[Any] = [
    None, True, -1, 0, 1, 99999999999, 1 << 62, -(1 << 63), 10**19, 1e308, "", "x" * 3000, "../x", "int32",
    "/dev/zero", "/etc/passwd", [], {}, [[]], {"a": {}}, [1, 2, 3], [-1, 1 << 60], [10**12] * 26,
    [1 << 62] * 2, ["1"] * 26, "\ud800", "a\nb", [[0]] * 26,
]  # fmt: skip


def as_command(work: Callable[[], Any]) -> int:
    """As the commands end: one line and a code for known errors, a traceback for the others."""
    return entry.run_for_exit_code(lambda _: work(), Ranks())


# --- what reads


def read_rows(kind: str, folder: str, stages: tuple[str, ...] = ("train", "val", "test")) -> None:
    """Every row of a dataset as batches, as a training sees them."""
    layout = scan_dataset(kind, folder)
    sizes, fold = choose_table_sizes(None, None, layout.columns.categorical, layout.table_sizes)
    for stage in stages:
        source = open_source(kind, layout, stage)
        for batch in BatchLoader(source, 16, to_batch=BatchCollator(sizes, fold)):
            assert int(batch.sparse_features.values().min()) >= 0
        source.close()


def reader(kind: str) -> Read:
    return lambda argv: as_command(lambda: read_rows(kind, argv[0]))


def read_ratings(name: str) -> Read:
    def read(argv: list[str]) -> None:
        path = find_ratings_file(name, argv[0])
        found = ratings.read_ratings(name, path, ratings.RatingsOptions())
        made = sequences.make_histories(found, min_user_count=3)
        count = sequences.count_candidates(made, None, 5)
        sequences.draw_negatives(made, count, True, 0)
        sequences.cut_windows(made, 10)

    return lambda argv: as_command(lambda: read(argv))


def read_cache(argv: list[str]) -> int:
    found = cache.load_prepared(Path(argv[0]), {})
    if found is not None:
        arrays, facts = found
        made = sequences.Histories(arrays["items"], arrays["starts"], facts["items"])
        if facts["items"] < 1 << 20:
            np.zeros(made.vocabulary)[arrays["negatives"].ravel()]
        bert_dataloaders.compute_best_scores(
            bert_dataloaders.PreparedData(made, arrays["negatives"]), (1, 10)
        )
    return 0


def read_sharding(argv: list[str]) -> int:
    import torch

    from dlrm.embeddings import planner
    from dlrm.embeddings.tables import make_table_configs
    from dlrm.models.dlrm.model import SparseArch

    def read() -> None:
        wanted = planner.load_constraints(Path(argv[0]) / "sharding.json")
        module = SparseArch(make_table_configs([100] * 26, 8), torch.device("meta"))
        planner.make_plan(module, torch.device("cpu"), Ranks(), 16, wanted)

    return as_command(read)


def run_prep(*words: str) -> Read:
    """`{}` is the hostile folder, `{out}` one beside it."""
    return lambda argv: prep_main([word.format(argv[0], out=argv[0] + ".out") for word in words])


# --- whole ones of each kind


def make_npy(folder: Path) -> Path:
    write_days(folder, [40, 23], high=50)
    DatasetMeta(rows=[40, 23], table_sizes=[50] * 26, parameters={"steps": ["parse"]}).save(folder)
    return folder


def make_npz(folder: Path) -> Path:
    write_days(folder, [40, 23], high=50)
    for day, count in enumerate((40, 23)):
        (folder / f"day_{day}_sparse.npy").unlink()
        members = {str(k): np.full((count, 1 + k % 3), k, np.int32) for k in range(26)}
        np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **members)  # type: ignore[arg-type]
    DatasetMeta(rows=[40, 23], table_sizes=[50] * 26, format="multi_hot").save(folder)
    return folder


def make_parquet(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for day, count in enumerate((40, 23)):
        part = make_rows(count, day, 50)
        columns = {"label": part["labels"].reshape(-1)}
        columns |= {f"I{k + 1}": part["dense"][:, k] for k in range(13)}
        columns |= {f"C{k + 1}": part["sparse"][:, k] for k in range(26)}
        pq.write_table(pa.table(columns), folder / f"day_{day}.parquet", row_group_size=17)
    return folder


def make_ratings(name: str, line: str, header: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        lines = [
            line.format(user, user + item, 1 + item % 5, 100 * item) for user in range(9) for item in range(5)
        ]
        (folder / name).write_text(header + "".join(lines))
        return folder / name if name == "text" else folder

    return make


def make_cache(folder: Path) -> Path:
    arrays = {
        "items": np.tile(np.arange(1, 5, dtype=np.int32), 3), "starts": np.arange(0, 13, 4),
        "negatives": np.full((3, 2), 5, np.int32),
    }  # fmt: skip
    cache.save_prepared(folder / "kept", arrays, {"items": 6})
    return folder / "kept"


def make_sharding(folder: Path) -> Path:
    folder.mkdir(parents=True)
    wanted: dict[str, Any] = {
        "*": {"sharding": "table_wise", "kernel": "fused"},
        "t_cat_1": {"sharding": ["row_wise"]},
        "t_cat_3": {"sharding": "column_wise", "min_partition": 4},
    }
    (folder / "sharding.json").write_text(json.dumps(wanted))
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], Read]] = {
    "stream": (make_npy, reader("stream")),
    "memory": (make_npy, reader("memory")),
    "mmap": (make_npy, reader("mmap")),
    "multi_hot": (make_npz, reader("multi_hot")),
    "parquet": (make_parquet, reader("parquet")),
    "ml-1m": (make_ratings("ratings.dat", "{}::{}::{}::{}\n"), read_ratings("ml-1m")),
    "ml-20m": (make_ratings("ratings.csv", "{},{},{},{}\n", "u,i,r,t\n"), read_ratings("ml-20m")),
    "text": (make_ratings("text", "{} {} {}\n"), read_ratings("text")),
    "cache": (make_cache, read_cache),
    "sharding": (make_sharding, read_sharding),
    "prep check": (make_npy, run_prep("check", "{}")),
    "prep contiguous": (make_npy, run_prep("contiguous", "--input_dir", "{}", "--output_dir", "{out}")),
    "prep shuffle": (make_npy, run_prep(
        "shuffle", "--input_dir_labels_and_dense", "{}", "--input_dir_sparse", "{}",
        "--output_dir_shuffled", "{out}",
    )),
    "prep multihot": (make_npy, run_prep(
        "multihot", "--input_dir", "{}", "--output_dir", "{out}", "--copy_labels_and_dense",
        "--multi_hot_sizes", ",".join(["2"] * 26),
    )),
}  # fmt: skip


def read_folder(argv: list[str]) -> int:
    """argv: one of KINDS, a folder."""
    return KINDS[argv[0]][1](argv[1:])


# --- damage


def change_value(value: Any, chance: random.Random) -> Any:
    """The same JSON with one value anywhere replaced by another."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: change_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], change_value(value[at], chance), *value[at + 1 :]]
    return chance.choice(STRANGE)


def damage_npy(data: bytes, chance: random.Random) -> bytes:
    """Another shape or type in the header, which keeps its length where that is possible."""
    text = data[10:128].decode()
    if chance.random() < 0.6:
        shape = ", ".join(str(chance.choice(HUGE)) for _ in range(chance.choice((0, 1, 2, 2, 2, 3, 6))))
        text = text[: text.index("(") + 1] + shape + text[text.index(")") :]
    else:
        names = ("<f8", ">i4", "|O", "<i2", "<U9", "<m8[ns]", "|V999", "<f4", "<i8")
        text = text.replace(text[11:14], chance.choice(names), 1)
    body = text.rstrip().ljust(117) + "\n"
    return data[:8] + struct.pack("<H", min(len(body), 65535)) + body.encode() + data[128:]


def damage_zip(data: bytes, chance: random.Random) -> bytes:
    """An extreme number somewhere in the list of members or in the record at the end."""
    made = bytearray(data)
    begin = data.find(b"PK\x01\x02")
    at = chance.randrange(begin, len(made) - 4)
    width = chance.choice((1, 2, 4))
    number = chance.choice((0, 1, 0xFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
    made[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(made)


def damage_parquet(data: bytes, chance: random.Random) -> bytes:
    """Bytes of the footer, where all numbers are, or of the head of a page."""
    made = bytearray(data)
    length = struct.unpack("<I", data[-8:-4])[0]
    low, high = (len(made) - 8 - length, len(made)) if chance.random() < 0.8 else (4, 400)
    for _ in range(chance.choice((1, 1, 2, 5))):
        made[chance.randrange(low, high)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    if chance.random() < 0.1:
        at = chance.randrange(low, high)
        made[at:at] = b"\xff" * chance.choice((1, 8, 9))
    return bytes(made)


def damage_text(data: bytes, chance: random.Random) -> bytes:
    """A field that is not a 64-bit number."""
    words = data.split(b"\n")
    at = chance.randrange(len(words))
    bad = (b"nan", b"inf", b"1e300", b"-9223372036854775808", b"9223372036854775807", b"18446744073709551615",
           b"99999999999999999999999999", b"x", b"", b'"', b"1.5", b"true", b"\xff")  # fmt: skip
    words[at] = (
        words[at].replace(b"1", chance.choice(bad), 1) if chance.random() < 0.7 else chance.choice(bad)
    )
    return b"\n".join(words)


def damage_bytes(name: str, data: bytes, chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.35 or not data:
        return mutate(data, chance)
    if name.endswith(".json"):
        return json.dumps(change_value(json.loads(data), chance)).encode()
    if name.endswith(".npy"):
        return damage_npy(data, chance)
    if name.endswith(".npz"):
        return damage_zip(data, chance)
    if name.endswith(".parquet"):
        return damage_parquet(data, chance)
    return mutate(data, chance) if name in ("items", "starts", "negatives") else damage_text(data, chance)


def replace_file(path: Path, chance: random.Random) -> str:
    """Something in its place that is not a file with these bytes."""
    kind = chance.choice(("fifo", "device", "socket", "folder", "dangling", "loop", "empty", "gone"))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/stdin")))
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()
    return kind


# --- the cases


def without_other_lines(found: Outcome, kind: str) -> Outcome:
    """`prep check` has a line for each flaw, and the preparation of ratings one for each step done."""
    lines = found.err.splitlines()
    if kind == "prep check" and all(line.startswith("dlrm.prep: ") for line in lines):
        lines = lines[-1:]
    lines = [line for line in lines if not re.match(r"step \d of 3 ", line)]
    return replace(found, err="\n".join(lines))


def read_damaged(argv: list[str]) -> None:
    """argv: one of KINDS, an empty folder, the first seed and the one after the last."""
    kind, place, seeds = argv[0], Path(argv[1]), range(int(argv[2]), int(argv[3]))
    make, read = KINDS[kind]
    made = outcome(lambda _: print(make(place / "good"), end=""), [], memory=None)
    assert made.code == 0, made.err
    good = Path(made.out)
    base = good.parent if good.is_file() else good

    def one(case: Path) -> Outcome:
        return outcome(read, [case / good.name if good.is_file() else case])

    names = sorted(path.name for path in base.iterdir() if path.is_file() and not path.name.startswith("."))
    case = place / "case"
    for seed in [-1, *seeds]:
        chance = random.Random(f"{kind} {seed}")
        shutil.copytree(base, case)
        name = chance.choice(names)
        done = "nothing"
        if seed >= 0 and chance.random() < 0.15:
            done = replace_file(case / name, chance)
        elif seed >= 0:
            done = "bytes"
            (case / name).write_bytes(damage_bytes(name, (case / name).read_bytes(), chance))
        if seed >= 0 and chance.random() < 0.05:  # a day that is far away
            (case / f"day_{chance.choice((2, 7, 9999, 10**12, '٣', '00', '01'))}{name[5:]}").touch()
        found = one(case)
        try:
            if seed < 0:
                assert found.code in (0, 1 if kind == "prep check" else 0, 2 if kind == "prep check" else 0)
            check(without_other_lines(found, kind))
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {seed}, {name} ({done}): {error}\n{found.err}") from None
        for made in place.glob("case*"):
            shutil.rmtree(made)


def damage_many(place: Path, kind: str, seeds: range) -> None:
    done = CASES.run("read_damaged", kind, place, seeds.start, seeds.stop, memory=None, seconds=3600)
    assert done.code == 0, done.err


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(tmp_path: Path, kind: str) -> None:
    damage_many(tmp_path, kind, range(15))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_bytes(tmp_path: Path, kind: str) -> None:
    damage_many(tmp_path, kind, range(1000, 1400))


# --- options


def open_dlrm(argv: list[str]) -> int:
    def work() -> None:
        import torch

        cfg = parse_options(Config, argv, "train", "")
        found = build.open_batches(cfg, Ranks())
        assemble_model(cfg.model, found.numerical, found.sizes, torch.device("cpu"), cfg.run.seed or 0, False)
        for each in (found.train, found.test):
            next(iter(each))

    return as_command(work)


def open_bert(argv: list[str]) -> int:
    def work() -> None:
        import torch

        from dlrm.models.bert4rec.build import build_bert4rec

        cfg = parse_options(BertConfig, argv, "bert4rec", "")
        found = bert_dataloaders.open_datasets(cfg, Ranks())
        build_bert4rec(cfg, found.data.vocabulary, torch.device("cpu"))
        next(iter(found.train))

    return as_command(work)


SMALL = (
    "--num_embeddings", "100", "--embedding_dim", "8", "--dense_arch_layer_sizes", "16,8",
    "--over_arch_layer_sizes", "8,1",
)  # fmt: skip
TRILLION = str(10**12)
ABSURD: dict[str, tuple[Read, tuple[str, ...]]] = {
    "batch": (open_dlrm, (*SMALL, "--batch_size", TRILLION)),
    "batch of 32 bits": (open_dlrm, (*SMALL, "--batch_size", "80000000")),
    "test batch": (open_dlrm, (*SMALL, "--test_batch_size", "80000000")),
    "width": (open_dlrm, (*SMALL, "--embedding_dim", TRILLION, "--interaction_type", "cat")),
    "width of tables": (open_dlrm, (*SMALL, "--embedding_dim", "16000000", "--interaction_type", "cat")),
    "tables": (open_dlrm, (*SMALL, "--num_embeddings", TRILLION)),
    "each table": (open_dlrm, (*SMALL, "--num_embeddings_per_feature", ",".join([TRILLION] * 26))),
    "layers": (open_dlrm, (*SMALL, "--over_arch_layer_sizes", "9000000,9000000,1")),
    "no layers": (open_dlrm, (*SMALL, "--over_arch_layer_sizes", ",")),
    "negative layers": (open_dlrm, (*SMALL, "--dense_arch_layer_sizes", "-5,8")),
    "cross": (open_dlrm, (*SMALL, "--interaction_type", "dcn", "--dcn_low_rank_dim", "9000000")),
    "cross layers": (open_dlrm, (*SMALL, "--interaction_type", "dcn", "--dcn_num_layers", "16000000")),
    "branches": (open_dlrm, (
        *SMALL, "--interaction_type", "projection", "--interaction_branch1_layer_sizes", "9000000,8000000",
    )),
    "multi-hot": (open_dlrm, (*SMALL, "--multi_hot_sizes", ",".join([str(10**9)] * 26))),
    "prefetch": (open_dlrm, (
        *SMALL, "--batch_size", "100000", "--prefetch_batches", TRILLION, "--limit_train_batches", TRILLION,
    )),
    "seed": (open_dlrm, (*SMALL, "--seed", "-1")),
    "long seed": (open_dlrm, (*SMALL, "--seed", "9" * 30)),
    "limit": (open_dlrm, (*SMALL, "--limit_train_batches", "9" * 18, "--batch_size", "80000000")),
    "timeout": (open_dlrm, (*SMALL, "--timeout", TRILLION)),
    "no number": (open_dlrm, (*SMALL, "--batch_size", "1e3")),
    "digits": (open_dlrm, (*SMALL, "--max_steps", "9" * 5000)),
    "bert length": (open_bert, ("--dataset_name", "random", "--max_len", "2000000000")),
    "bert batch": (open_bert, ("--dataset_name", "random", "--train_batch_size", TRILLION)),
    "bert width": (open_bert, ("--dataset_name", "random", "--emb_dim", "4000000")),
    "bert layers": (open_bert, ("--dataset_name", "random", "--num_layers", TRILLION)),
    "bert copies": (open_bert, ("--dataset_name", "random", "--dupe_factor", TRILLION)),
    "bert size": (open_bert, ("--dataset_name", "random", "--random_size", "2000000000")),
    "bert walks": (open_bert, ("--dataset_name", "markov", "--random_user_count", "2000000000")),
    "bert items": (open_bert, ("--dataset_name", "markov", "--random_item_count", "2000000000")),
    "bert candidates": (open_bert, ("--dataset_name", "random", "--negatives", TRILLION)),
    "toy rows": (prep_main, ("toy", "out", "--rows", TRILLION)),
    "toy days": (prep_main, ("toy", "out", "--days", TRILLION)),
    "toy seed": (prep_main, ("toy", "out", "--seed", "-1")),
    "prep workers": (prep_main, ("parse", "--input_dir", "in", "--output_dir", "out", "--workers", TRILLION)),
}  # fmt: skip


def open_absurd(argv: list[str]) -> int:
    """argv: one of ABSURD, the folder to be in."""
    os.chdir(argv[1])
    read, words = ABSURD[argv[0]]
    return read([*words])


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_are_refused(tmp_path: Path, case: str) -> None:
    check(without_other_lines(CASES.run("open_absurd", case, tmp_path), case), refused=True)
    assert not list(tmp_path.iterdir())


def test_usual_sizes_are_not_refused() -> None:
    for read, words in (
        ("open_dlrm", SMALL),
        ("open_dlrm", (*SMALL, "--batch_size", "65536", "--limit_train_batches", "1000000")),
        ("open_dlrm", (*SMALL, "--multi_hot_sizes", ",".join(["3"] * 26), "--seed", str((1 << 32) - 1))),
        ("open_bert", ("--dataset_name", "random")),
    ):
        found = CASES.run(read, *words)
        assert found.code == 0, found.err


# --- other hostile files, whose cases are known


def refuse_folder(kind: str, folder: Path, *wanted: str) -> None:
    found = CASES.run("read_folder", kind, folder)
    check(found, refused=True)
    assert all(each in found.err for each in wanted), found.err


def test_a_day_beyond_meta_is_not_ignored(tmp_path: Path) -> None:
    make_npy(tmp_path / "set")
    for part in ("dense", "sparse", "labels"):
        shutil.copy(tmp_path / "set" / f"day_0_{part}.npy", tmp_path / "set" / f"day_2_{part}.npy")
    refuse_folder("stream", tmp_path / "set", "day 2", "meta.json says", "2 days")


def test_ids_in_the_other_byte_order(tmp_path: Path) -> None:
    folder = make_npy(tmp_path / "set")
    path = folder / "day_0_sparse.npy"
    np.save(path, np.load(path).astype(">i4"))
    for kind in ("stream", "mmap", "prep contiguous"):
        refuse_folder(kind, folder, path.name, ">i4")


def test_a_million_of_days(tmp_path: Path) -> None:
    for kind, ending in (("stream", "_dense.npy"), ("parquet", ".parquet")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / f"day_999999999999{ending}").touch()
        refuse_folder(kind, folder, "999999999999", str(folder))


def test_a_zip_whose_member_is_longer_than_the_file(tmp_path: Path) -> None:
    folder = make_npz(tmp_path / "set")
    path = folder / "day_0_sparse_multi_hot.npz"
    header = b"\x93NUMPY\x01\x00v\x00" + str(
        {"descr": "<i4", "fortran_order": False, "shape": (40, 1 << 40)}
    ).ljust(117).encode() + b"\n"  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        for feature in range(26):
            archive.writestr(f"{feature}.npy", header)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = b"\xfe\xff\xff\xff"  # its size in the list of members
    path.write_bytes(data)
    refuse_folder("multi_hot", folder, path.name)


def test_a_row_group_of_a_billion_rows(tmp_path: Path) -> None:
    """A column of one value is a few bytes, however long it is."""
    folder = tmp_path / "set"
    folder.mkdir()
    count = 3_000_000
    zeros = pa.array(np.zeros(count, np.int32))
    table = pa.table({"label": zeros, **{f"I{k}": zeros for k in range(1, 14)},
                      **{f"C{k}": zeros for k in range(1, 27)}})  # fmt: skip
    for day in (0, 1):
        pq.write_table(table, folder / f"day_{day}.parquet", row_group_size=count)
    refuse_folder("parquet", folder, "day_0.parquet", "row group 0")


def test_unreadable_files_and_folders(tmp_path: Path) -> None:
    if not os.getuid():
        pytest.skip("root reads everything")
    folder = make_npy(tmp_path / "set")
    (folder / "day_0_dense.npy").chmod(0)
    refuse_folder("stream", folder, "day_0_dense.npy", "Permission denied")
    folder.chmod(0o111)
    refuse_folder("stream", folder, str(folder), "Permission denied")
    folder.chmod(0o755)
