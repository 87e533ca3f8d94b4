"""What a run tells the world: metrics, TensorBoard, the live display, GPU telemetry and the report."""
