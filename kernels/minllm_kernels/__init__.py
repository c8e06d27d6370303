"""Accelerated operations for language models: each one function, one docstring, one gradient, several implementations.

Depends on jax alone.
"""

from minllm_kernels.ops.attention import attention
from minllm_kernels.ops.causal_conv import causal_conv
from minllm_kernels.ops.cross_entropy import cross_entropy
from minllm_kernels.ops.delta_rule import delta_rule
from minllm_kernels.ops.grouped_matmul import grouped_matmul
from minllm_kernels.ops.linear_attention import linear_attention
from minllm_kernels.ops.paged_attention import paged_attention
from minllm_kernels.ops.selective_scan import selective_scan

__all__ = [
    "attention",
    "causal_conv",
    "cross_entropy",
    "delta_rule",
    "grouped_matmul",
    "linear_attention",
    "paged_attention",
    "selective_scan",
]
