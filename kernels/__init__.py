"""Kernels of the distillation objectives: top-k overlap, divergences on logits and on an output layer, by Triton on
CUDA.

`reference` is the plain torch version that defines each of them, and what runs everywhere else (`choice`). One file per
operation (`topk`, `topk_kl`, `token_kl`, `linear_token_kl`, `logprobs`), its Triton code of the same name in `device`.
All take a vocabulary in parts (`vocabulary`), and say which argument is wrong (`arguments`). docs/kernels.md has the
rest.
"""
