"""What a run tells: the console, TensorBoard, and the run report (JSON and Markdown)."""
