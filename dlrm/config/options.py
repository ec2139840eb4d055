"""Option groups that every model has: sharding, run, checkpoints. MLCommons' names where it has them."""

from dataclasses import dataclass

from dlrm.config.parser import check_at_least, check_at_most, option, parsed_field, path_option
from dlrm.runtime.errors import UserError

CPU_FAST_PATH_HELP = (
    "CPU ranks: collectives through shared memory, dense layers in place, the faster BLAS, huge pages "
    "(off: torch's and torchrec's own; no effect on CUDA)"
)
LARGEST_SEED = (1 << 32) - 1  # numpy's generators take no more
LONGEST_WAIT = 10**8  # in seconds or ms: torch counts ten times as many seconds in ns of 64 bits


@dataclass(frozen=True)
class PlanOptions:
    sharding_file: str | None = path_option("JSON: table name -> sharding, kernel; * for all others")
    print_sharding_plan: bool = option(False, "print how each table is sharded")
    store_type: str = option(
        "device_mem", "where tables are stored; auto: where they fit",
        ("device_mem", "cached_host_mem", "cached_ssd", "auto"),
    )  # fmt: skip
    cache_memory_budget_mb: float = option(
        8192, "memory per rank for cached rows of tables that are stored elsewhere"
    )
    persistent_path: str | None = path_option(
        "folder of the tables' files (default: the folder store in --output_dir)"
    )

    def __post_init__(self) -> None:
        check_at_least(0.001, self, "cache_memory_budget_mb")


@dataclass(frozen=True)
class RunOptions:
    output_dir: str | None = path_option(
        "run folder: config, metrics, results, traces (default: none written)"
    )
    mode: str = option(
        "train", "test: only test, from a checkpoint; inference_benchmark: time the forward pass",
        ("train", "test", "inference_benchmark"),
    )  # fmt: skip
    epochs: int = option(1, "passes over the training set")
    seed: int | None = option(None, "makes a run reproducible")
    evaluate_on_epoch_end: bool = option(False, "validate after each epoch")
    evaluate_on_training_end: bool = option(False, "test after the last epoch")
    validation_freq_within_epoch: int | None = option(None, "validate every N steps")
    validation_auroc: float | None = option(None, "stop once validation reaches this AUROC")
    validation_split: str = option("val", "the rows that validations score", ("val", "test"))
    test_after: float = option(0.0, "no validation before X epochs are trained")
    max_steps: int | None = option(None, "stop after N steps in all")
    benchmark_warmup_steps: int = option(1, "first steps that samples_per_second of results.json leaves out")
    report_every: int = option(20, "steps between two reports of loss and samples per second")
    print_lr: bool = option(False, "print the learning rate of every step")
    print_progress: bool = option(False, "a progress bar on rank 0")
    allow_tf32: bool = option(False, "TF32 matrix products on CUDA")
    compile: bool = option(False, "torch.compile the dense part")
    trace: bool = option(False, "record every I/O call and stage with DFTracer (needs --output_dir)")
    trace_flush_ms: int = option(1000, "a killed run loses at most the last N ms of its trace")
    profile_steps: str | None = option(
        None,
        "A-B: torch.profiler on these steps, on every rank, for Perfetto and the report (in --output_dir)",
    )
    mllog: bool = option(False, "MLPerf :::MLLOG lines, in mlperf.log of the run folder too")
    mllog_submitter: str = option("dlrm-io", "submission_org of the MLPerf log")
    mllog_platform: str = option("dlrm-io", "submission_platform of the MLPerf log")
    mlcommons_log: bool = option(
        False, "also print the lines of MLCommons' dlrm_main.py: AUROC over val set: X. ..."
    )
    tensorboard: bool = option(False, "scalars for TensorBoard in the run folder")
    cpu_fast_path: bool = option(True, CPU_FAST_PATH_HELP)
    exchange: str = option("auto", "deprecated: gloo is --no-cpu_fast_path", ("auto", "gloo"))
    timeout: int = option(60, "seconds without a heartbeat after which a rank counts as lost")
    preset: str | None = parsed_field(None)
    given_options: tuple[str, ...] = parsed_field(())  # on the command line or by the preset

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "epochs", "report_every", "timeout", "validation_freq_within_epoch", "max_steps",
            "trace_flush_ms",
        )  # fmt: skip
        check_at_least(0, self, "seed", "test_after", "benchmark_warmup_steps")
        check_at_most(LARGEST_SEED, self, "seed")
        check_at_most(LONGEST_WAIT, self, "timeout", "trace_flush_ms")
        if self.exchange == "gloo":
            object.__setattr__(self, "cpu_fast_path", False)
        if self.trace and not self.output_dir:
            raise UserError(
                "a traced run needs --output_dir, where the trace is written: give it, or --no-trace"
            )
        if self.profile_steps is not None:
            from dlrm.runtime.step_profiler import parse_steps

            parse_steps(self.profile_steps)
            if not self.output_dir:
                raise UserError("--profile_steps needs --output_dir: the profile is written there")


def list_deprecated(run: RunOptions) -> list[str]:
    """One line for each option of an earlier release that was given, with what to use instead."""
    return ["--exchange gloo is deprecated: use --no-cpu_fast_path"] if run.exchange == "gloo" else []


@dataclass(frozen=True)
class CheckpointOptions:
    checkpoint_dir: str | None = path_option("where checkpoints go (default: checkpoints in --output_dir)")
    checkpoint_every_steps: int | None = option(None, "save every N steps")
    checkpoint_every_minutes: float | None = option(None, "save every X minutes")
    checkpoint_epochs: bool = option(True, "if checkpoints are enabled: also save after each epoch")
    keep_checkpoints: int = option(3, "how many to keep, in addition to the best one; 0: all")
    save_initial_model: bool = option(False, "save before the first step")
    save_model_after_each_eval: bool = option(False, "save after each validation")
    resume: str = option(
        "auto", "auto: resume from the newest intact checkpoint of this run folder", ("auto", "never")
    )
    load_checkpoint_path: str | None = path_option(
        "a checkpoint, or a folder of them, to resume from (or to test)"
    )
    load_model_only: bool = option(False, "take only the weights of --load_checkpoint_path, start at step 0")
    stop_before_walltime: float | None = option(None, "save and stop X seconds before the job's end")
    walltime: str | None = option(None, "the job's time, [HH:]MM:SS or seconds (default: as PBS says)")

    def __post_init__(self) -> None:
        check_at_least(1, self, "checkpoint_every_steps")
        check_at_least(0, self, "checkpoint_every_minutes", "keep_checkpoints", "stop_before_walltime")
        if self.load_model_only and not self.load_checkpoint_path:
            raise UserError("--load_model_only needs --load_checkpoint_path")

    @property
    def asked(self) -> bool:
        return bool(
            self.checkpoint_dir or self.checkpoint_every_steps or self.checkpoint_every_minutes
            or self.save_initial_model or self.save_model_after_each_eval
        )  # fmt: skip
