"""Accelerated operations for language models: each one function, one docstring, one gradient, several implementations.

Depends on jax alone.
"""

from minllm_kernels.ops.attention import attention

__all__ = ["attention"]
