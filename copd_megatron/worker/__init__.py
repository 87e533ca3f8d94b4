"""What one rank of a branch runs: how it opens, what it holds, how it speaks. `branch.py` and `train.py` use it."""
