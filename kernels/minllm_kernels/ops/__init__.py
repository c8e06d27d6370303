"""One folder an op: the op and its gradient, its reference, its plain-JAX form, its TPU and GPU kernels."""
