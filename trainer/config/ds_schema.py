"""The keys of a DeepSpeed 0.19.8 configuration and their types. DeepSpeed itself ignores most misspelt ones.

A test holds the typed blocks against DeepSpeed's own classes. Types: bool, int, float (a whole number is fine), str, list, dict.
"auto" is allowed where AUTO says so.
"""
_OFFLOAD = {"device": str, "nvme_path": str, "buffer_count": int, "pin_memory": bool}

ZERO = {
    "stage": int, "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool, "allgather_partitions": bool, "allgather_bucket_size": int, "overlap_comm": bool,
    "compute_grad_norm": bool, "load_from_fp32_weights": bool, "elastic_checkpoint": bool, "sub_group_size": int,
    "cpu_offload_param": bool, "cpu_offload_use_pin_memory": bool, "cpu_offload": bool, "ignore_unused_parameters": bool,
    "legacy_stage1": bool, "round_robin_gradients": bool, "parameter_alignment": bool, "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool, "zero_quantized_nontrainable_weights": bool, "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool, "pipeline_loading_checkpoint": bool, "override_module_apply": bool,
    "log_trace_cache_warnings": bool, "enable_sanity_checks": bool, "save_muon_momentum_buffer_in_memory": bool,
    "stage3_prefetch_bucket_size": int, "stage3_param_persistence_threshold": int, "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int, "stage3_max_reuse_distance": int, "stage3_gather_16bit_weights_on_model_save": bool,
    "stage3_module_granularity_threshold": int, "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool, "stage3_gather_fp16_weights_on_model_save": bool,
    "zenflow": dict,
    "leaf_module": {"classes": list, "names": list, "name_suffixes": list},
    "offload_param": {**_OFFLOAD, "buffer_size": int, "max_in_cpu": int},
    "offload_optimizer": {**_OFFLOAD, "pipeline_read": bool, "pipeline_write": bool, "fast_init": bool, "ratio": float,
                          "super_offload": bool, "cpuadam_cores_perc": float},
}
BF16 = {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool, "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool}
FP16 = {"enabled": bool, "auto_cast": bool, "loss_scale": float, "initial_scale_power": int, "loss_scale_window": int,
        "hysteresis": int, "consecutive_hysteresis": bool, "min_loss_scale": int, "fp16_master_weights_and_grads": bool}
AIO = {"block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool, "overlap_events": bool,
       "use_gds": bool}

CONFIG = {
    "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
    "gradient_clipping": float, "steps_per_print": int, "wall_clock_breakdown": bool, "memory_breakdown": bool,
    "dump_state": bool, "prescale_gradients": bool, "gradient_predivide_factor": float, "communication_data_type": str,
    "seq_parallel_communication_data_type": str, "disable_allgather": bool, "disable_python_gc": bool,
    "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool, "dataloader_drop_last": bool,
    "log_level": str, "zero_optimization": ZERO, "bf16": BF16, "fp16": FP16, "aio": AIO,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool}, "scheduler": {"type": str, "params": dict},
    "data_types": {"grad_accum_dtype": str, "param_dtype": str, "buffer_dtype": str},
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "checkpoint": {"tag_validation": str, "load_universal": bool, "use_node_local_storage": bool, "parallel_write": dict},
    "activation_checkpointing": {"partition_activations": bool, "contiguous_memory_optimization": bool,
                                 "cpu_checkpointing": bool, "number_checkpoints": int,
                                 "synchronize_checkpoint_boundary": bool, "profile": bool},
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": dict, "tensorboard": dict, "csv_monitor": dict, "wandb": dict, "comet": dict, "compile": dict,
    "timers": dict,
}

# "auto" resolved from the model by this trainer, and "auto" that transformers fills from the training arguments.
AUTO_MODEL = {
    "zero_optimization": {"reduce_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
                          "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"},
    "zero_optimization.offload_param": {"buffer_size", "buffer_count", "nvme_path"},
    "zero_optimization.offload_optimizer": {"buffer_count", "nvme_path"},
}
AUTO_TRAINING = {
    "": {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"},
    "bf16": {"enabled"}, "fp16": {"enabled"},
}
