"""When a phase ends by what was measured: readings of all edges in, a reason to switch out."""
