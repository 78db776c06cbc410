"""The keys of a DeepSpeed 0.19.8 configuration and their types.

DeepSpeed itself ignores most misspelt ones. A test compares the typed blocks with DeepSpeed's own
classes. Types: bool, int, float (a whole number is fine), str, list, dict. "auto" is allowed where
AUTO says so.
"""

_OFFLOAD = {"device": str, "nvme_path": str, "buffer_count": int, "pin_memory": bool}

ZERO = {
    **dict.fromkeys(
        (
            "contiguous_gradients",
            "reduce_scatter",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "overlap_comm",
            "compute_grad_norm",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
            "cpu_offload",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "parameter_alignment",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "save_muon_momentum_buffer_in_memory",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "stage3_gather_fp16_weights_on_model_save",
        ),
        bool,
    ),
    **dict.fromkeys(
        (
            "stage",
            "reduce_bucket_size",
            "allgather_bucket_size",
            "sub_group_size",
            "zero_hpz_partition_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
        ),
        int,
    ),
    "zenflow": dict,
    "leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), list),
    "offload_param": {**_OFFLOAD, "buffer_size": int, "max_in_cpu": int},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "fast_init": bool,
        "ratio": float,
        "super_offload": bool,
        "cpuadam_cores_perc": float,
    },
}
BF16 = dict.fromkeys(
    (
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    bool,
)
FP16 = {
    "enabled": bool,
    "auto_cast": bool,
    "loss_scale": float,
    "initial_scale_power": int,
    "loss_scale_window": int,
    "hysteresis": int,
    "consecutive_hysteresis": bool,
    "min_loss_scale": int,
    "fp16_master_weights_and_grads": bool,
}
AIO = {
    "block_size": int,
    "queue_depth": int,
    "intra_op_parallelism": int,
    "single_submit": bool,
    "overlap_events": bool,
    "use_gds": bool,
}

CONFIG = {
    **dict.fromkeys(
        (
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "prescale_gradients",
            "disable_allgather",
            "disable_python_gc",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
            "dataloader_drop_last",
        ),
        bool,
    ),
    **dict.fromkeys(
        (
            "flops_profiler",
            "tensorboard",
            "csv_monitor",
            "wandb",
            "comet",
            "compile",
            "timers",
        ),
        dict,
    ),
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "gradient_predivide_factor": float,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "log_level": str,
    "zero_optimization": ZERO,
    "bf16": BF16,
    "fp16": FP16,
    "aio": AIO,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "scheduler": {"type": str, "params": dict},
    "data_types": {"grad_accum_dtype": str, "param_dtype": str, "buffer_dtype": str},
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "checkpoint": {
        "tag_validation": str,
        "load_universal": bool,
        "use_node_local_storage": bool,
        "parallel_write": dict,
    },
    "activation_checkpointing": {
        "partition_activations": bool,
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "number_checkpoints": int,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "comms_logger": {
        "enabled": bool,
        "prof_all": bool,
        "prof_ops": list,
        "verbose": bool,
        "debug": bool,
    },
}

# "auto" that this trainer resolves from the model; at the top and for the precision, "auto" that
# transformers fills from the training arguments.
AUTO = {
    "zero_optimization": {
        "reduce_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    },
    "zero_optimization.offload_param": {"buffer_size", "buffer_count", "nvme_path"},
    "zero_optimization.offload_optimizer": {"buffer_count", "nvme_path"},
    "": {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    },
    "bf16": {"enabled"},
    "fp16": {"enabled"},
}
