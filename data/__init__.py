"""Records in, token batches out. Imports nothing of `trainer` or `launch`."""


class DataError(Exception):
    """Bad input data. The message names the file and line, what was found and what is needed."""
