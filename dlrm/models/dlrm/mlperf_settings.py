"""A DLRM's settings as MLPerf's log has them, under the keys that its compliance checker expects."""

from typing import Any

from dlrm.models.dlrm.options import Config

NAMES = {"dcn": "dlrm_dcnv2"}  # interaction -> benchmark; the others were MLPerf's "dlrm"
PRECISIONS = {"off": "fp32", "bf16": "bfloat16", "fp16": "fp16"}


def list_mlperf_settings(cfg: Config, world_size: int) -> dict[str, Any]:
    """Key -> value, in the order in which they are logged."""
    optim, run = cfg.optim, cfg.run
    batch_size = world_size * cfg.data.batch_size
    settings = {
        "submission_benchmark": NAMES.get(cfg.model.interaction_type, "dlrm"),
        "submission_org": run.mllog_submitter,
        "submission_division": "closed",
        "submission_status": "onprem",
        "submission_platform": run.mllog_platform,
        "global_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "seed": run.seed or 0,
        "opt_name": optim.name,
        "opt_base_learning_rate": optim.learning_rate,
        "opt_weight_decay": 0,
        "opt_learning_rate_warmup_steps": optim.lr_warmup_steps,
        "opt_learning_rate_decay_start_step": optim.lr_decay_start,
        "opt_learning_rate_decay_steps": optim.lr_decay_steps,
        "lowest_numerical_precision_in_linear": "tf32"
        if run.allow_tf32 and optim.amp == "off"
        else PRECISIONS[optim.amp],
    }
    if "adagrad" in optim.name:
        settings |= {
            "opt_adagrad_learning_rate_decay": 0,
            "opt_adagrad_initial_accumulator_value": 0,
            "opt_adagrad_epsilon": optim.eps,
        }
    return settings
