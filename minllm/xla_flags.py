"""What the compiler is told beside the program: options of XLA by chip, each with its reason. Train and plan use the same.

They go with each compilation (`compiler_options`), so no environment variable has to be set before jax is imported.
"""

# option: (value, reason)
_EVERY_TPU = {
    # XLA splits a matmul whose weight is gathered into a chain of partial matmuls and permutes ("collective matmul") where the weight has
    # more MiB than this. Under FSDP that is every matmul: the 8b step for v6e-16 gets 19 permutes a gather and runs them one after another.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_BY_CHIP = {
    "TPU v5 lite": {
        # one reduction of all small gradients instead of one each, begun while the rest of the backward pass runs
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    "TPU v5": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    "TPU v6 lite": {
        # v6e has 128 MiB of vector memory, of which kernels and fusions get 16 by default: larger tiles read their operands less often
        "xla_tpu_scoped_vmem_limit_kib": "98304",
        # a gathered weight is scattered again in the layout that it is stored in, without a copy between
        "xla_tpu_assign_all_reduce_scatter_layout": "true",
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    "TPU7x": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
}


def options(device_kind: str) -> dict[str, str]:
    """The compiler's options for a jax device; none where there is nothing to say, as for CPUs and GPUs."""
    return _EVERY_TPU | _BY_CHIP[device_kind] if device_kind in _BY_CHIP else {}
