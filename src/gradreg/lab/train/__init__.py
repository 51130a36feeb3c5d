"""One run with a folder of its own: the loop, checkpoints, stopping, several processes."""
