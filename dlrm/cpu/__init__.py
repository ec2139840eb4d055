"""For CPU ranks only: collectives through shared memory, dense layers in place, a faster BLAS.

In: the hooks of `dlrm.runtime.accelerate`. Out: the same results, sooner. The entry is
`fast_path.enable_fast_path`, which `dlrm.trainer.device` calls unless
--no-cpu_fast_path; on CUDA nothing here is imported.
"""
