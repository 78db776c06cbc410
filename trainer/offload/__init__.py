"""Our extension of DeepSpeed's offload path. It fits one version and steps aside for any other."""
import functools

SUPPORTED = "0.19.8"


def apply():
    """Mend DeepSpeed 0.19.8 in place, once. Returns what was mended, in words; nothing for another version."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != SUPPORTED:
        return []
    return [_prefetch_each_parameter_once(), _copy_out_of_swap_buffers()]


def _prefetch_each_parameter_once():
    # The NVMe look-ahead walks the list of coming uses. Where forward turns into backward the last layers stand in it twice,
    # and the swapper fails with "already assigned swap buffer" (runtime/zero/partitioned_param_coordinator.py,
    # __prefetch_nvme_param_partitions). A look-ahead of a whole layer, or a small model, meets this at once.
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper as Swapper

    plain = Swapper.swap_in
    if not hasattr(plain, "__wrapped__"):
        @functools.wraps(plain)
        def swap_in(self, params, *args, **kwargs):
            return plain(self, list(dict.fromkeys(params)), *args, **kwargs)

        Swapper.swap_in = swap_in
    return "NVMe prefetch takes each parameter once"


def _copy_out_of_swap_buffers():
    # On one CPU rank a fetched parameter is the swap buffer itself, not a copy as it is on a GPU. The forward pass saves views of
    # it, the buffer is read over with another parameter, and the backward pass computes with that one's values: the losses drift
    # and nothing fails (runtime/zero/partition_parameters.py, NoGatherHandle and NoGatherCoalescedHandle).
    from deepspeed.runtime.zero import partition_parameters as zero

    def mended(handle):
        plain = handle.__init__

        @functools.wraps(plain)
        def init(self, params):
            plain(self, params)
            for param in params if isinstance(params, (list, tuple, set)) else [params]:
                if param.nvme_swapper is not None and param.data.data_ptr() == param.ds_tensor.data_ptr():
                    param.data = param.data.clone()

        return init

    for handle in (zero.NoGatherHandle, zero.NoGatherCoalescedHandle):
        if not hasattr(handle.__init__, "__wrapped__"):
            handle.__init__ = mended(handle)
    return "parameters fetched from NVMe on a CPU are copied out of the swap buffers"
