"""Scripts that start a run, filled in by `copd launch` (copd_megatron/cluster/script.py)."""
