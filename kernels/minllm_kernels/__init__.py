"""Accelerated operations for language models: each one function, one docstring, one gradient, several implementations.

Depends on jax alone.
"""

from minllm_kernels.ops.attention import attention
from minllm_kernels.ops.cross_entropy import cross_entropy

__all__ = ["attention", "cross_entropy"]
