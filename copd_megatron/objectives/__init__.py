"""What a branch minimises and what it measures: pure functions from tensors to tensors."""
