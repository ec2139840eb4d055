"""The only entry: `enable_fast_path` switches everything in this folder on, for this process."""

from dlrm.cpu import blas, linear_relu, pooled_embeddings, process_group, startup
from dlrm.runtime import accelerate


def enable_fast_path() -> list[str]:
    """Replace the hooks of `accelerate` and tune torch for this processor; returns a line for each tuning.

    Call it once, on a CPU rank, after torch is imported and before the process group is made.
    """
    startup.import_optimizers()
    accelerate.use_hooks(
        accelerate.FastPath(
            choose_backend=process_group.register_backend,
            run_mlp=linear_relu.run_mlp,
            replace_output_dists=pooled_embeddings.install_shared_memory_dists,
            skip_first_weights=startup.skip_first_weights,
        )
    )
    return blas.tune_processor()
