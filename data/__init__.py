"""Records in, packed token batches out. Imports nothing of `trainer` or `launch`."""


class DataError(Exception):
    """Data that cannot be used: the message says where, what was found, and the mend. Ends with exit code 2."""


class RowError(ValueError):
    """One row cannot be used, and why."""
