"""The Megatron side of a branch: layouts, models, batches, the trainer and its checkpoints."""
