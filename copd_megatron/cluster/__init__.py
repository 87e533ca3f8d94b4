"""A run on several nodes: which process goes where, Slurm's steps, and what is checked before the first of them."""
