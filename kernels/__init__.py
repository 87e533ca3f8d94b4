"""Kernels of the distillation objectives; `reference` is the plain torch version that defines each of them."""
