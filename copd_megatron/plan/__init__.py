"""What a run will need, before anything is launched: memory per rank, time per step, traffic, and how it scales."""
