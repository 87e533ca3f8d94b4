"""Co-Evolving Policy Distillation at Megatron scale.

Branches of one base model train in parallel with verifiable rewards and teach each other while they train;
at the end they are merged and exported to Hugging Face format. `copd_megatron/train.py` is the algorithm.
"""

__version__ = "0.1.0"
