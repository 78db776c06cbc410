"""Records in, packed token batches out. Imports nothing of `trainer` or `launch`."""
