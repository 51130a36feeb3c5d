"""What a step costs: time, FLOPs and memory, relative to plain SGD."""
