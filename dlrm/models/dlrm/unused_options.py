"""Options that were given and have no effect in this run: a warning each, instead of silence."""

from collections.abc import Iterator
from dataclasses import fields

from dlrm.models.dlrm.options import Config


def list_unused_options(cfg: Config, device: str) -> list[str]:
    """One line for each group of given options without effect in this run, with the reason."""
    return [f"{', '.join(names)}: not used, {why}" for names, why in _list_groups(cfg, device) if names]


def _list_groups(cfg: Config, device: str) -> Iterator[tuple[list[str], str]]:
    """(options that were given and have no effect, why), rule by rule."""
    data, model, optim, plan, run = cfg.data, cfg.model, cfg.optim, cfg.plan, cfg.run
    files = ["dataset_name", "mmap_mode", "shuffle_batches", "shuffle_training_set", "read_chunk_mb"]
    many = data.multi_hot_sizes or data.kind == "multi_hot"
    layers = ["interaction_branch1_layer_sizes", "interaction_branch2_layer_sizes"]
    schedule = ["lr_schedule", "lr_warmup_steps", "lr_warmup_factor", "lr_decay_start", "lr_decay_steps"]
    mlperf_rate = optim.lr_schedule == "mlperf" and not optim.change_lr
    kind, validates = model.interaction_type, run.evaluate_on_epoch_end or run.validation_freq_within_epoch
    in_memory = plan.store_type == "device_mem" and not plan.sharding_file  # which may say more of a table
    rules = [
        (data, files, data.kind == "random", "the data is random"),
        (
            data,
            ["shuffle_batch_order"],
            data.shuffle_training_set,
            "--shuffle_training_set shuffles all rows",
        ),
        (data, ["mmap_mode"], data.kind == "multi_hot", "multi-hot files are streamed"),
        (data, ["mmap_mode"], data.kind in ("stream", "memory", "parquet"), f"the source is {data.kind}"),
        (data, ["read_chunk_mb"], data.kind in ("mmap", "parquet"), f"the source is {data.kind}"),
        (data, ["multi_hot_distribution_type"], not data.multi_hot_sizes, "without --multi_hot_sizes"),
        (data, ["collect_multi_hot_freqs_stats"], not many, "each feature has one id"),
        (data, ["pin_memory"], device == "cpu", "there is no GPU"),
        (run, ["allow_tf32"], device == "cpu", "there is no GPU"),
        (run, ["cpu_fast_path"], device != "cpu", "the ranks run on GPUs"),
        (model, ["dcn_num_layers", "dcn_low_rank_dim"], kind != "dcn", "--interaction_type is not dcn"),
        (model, layers, kind != "projection", "--interaction_type is not projection"),
        (model, ["self_interaction"], kind not in ("original", "dot"), "the interaction has no dot products"),
        (plan, ["cache_memory_budget_mb", "persistent_path"], in_memory, "--store_type is device_mem"),
        (optim, ["lr_change_point", "lr_after_change_point"], not optim.change_lr, "without --change_lr"),
        (optim, schedule, optim.change_lr, "--change_lr is the schedule"),
        (optim, ["lr_warmup_factor"], mlperf_rate, "--lr_schedule is not nvidia"),
        (optim, ["lr_decay_start"], not optim.lr_decay_steps, "--lr_decay_steps is 0"),
        (optim, ["loss_scale", "loss_scale_policy"], optim.amp != "fp16", "--amp is not fp16"),
        (optim, ["eps"], optim.name == "sgd", "sgd has no epsilon"),
        (run, ["tensorboard"], not run.output_dir, "without --output_dir"),
        (
            run,
            ["validation_auroc", "validation_split", "test_after"],
            not validates,
            "nothing validates: give --evaluate_on_epoch_end",
        ),
    ]
    for group, names, idle, why in rules:
        yield ([f"--{name}" for name in names if name in _list_changed_options(group)] if idle else []), why


def _list_changed_options(group: object) -> set[str]:
    """Names of the options that do not have their default."""
    return {each.name for each in fields(group) if getattr(group, each.name) != each.default}  # type: ignore[arg-type]
