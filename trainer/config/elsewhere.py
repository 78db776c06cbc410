"""The names of other trainers for our flags. Does not import torch."""

# Of LLaMA-Factory, axolotl, TRL, Unsloth, torchtune, ms-swift, open-instruct: {our flag: theirs}.
_NAMES = {
    "model_name_or_path": (
        "base_model model model_id model_id_or_path model_name model_path "
        "pretrained_model_name_or_path"
    ),
    "model_revision": "revision",
    "attn_implementation": (
        "attention_implementation attn_impl flash_attention flash_attn use_flash_attn"
    ),
    "dataset": (
        "data_files data_path dataset_mixer_list dataset_name dataset_path datasets "
        "train_data train_file train_files training_data"
    ),
    "dataset_dir": "custom_dataset_info data_dir",
    "validation_split": (
        "eval_data_path eval_dataset eval_file split_dataset_ratio test_size val_dataset "
        "val_set_size val_size validation_file validation_split_percentage"
    ),
    "max_length": (
        "block_size context_length cutoff_len max_len max_seq_len max_seq_length max_tokens "
        "model_max_length seq_len seq_length sequence_len sequence_length"
    ),
    "too_long": "excess_length_strategy truncation_strategy",
    "packing": "multipack neat_packing sample_packing",
    "template": "chat_template conversation_template prompt_template template_type",
    "train_on_prompt": "train_on_input train_on_inputs train_on_source",
    "last_turn_only": "mask_history",
    "method": (
        "adapter finetune_type finetuning_type peft_type sft_type train_type tuner_type "
        "use_lora use_peft"
    ),
    "lora_r": "lora_rank peft_lora_r rank",
    "lora_alpha": "peft_lora_alpha",
    "lora_dropout": "lora_dropout_p",
    "lora_target_modules": "lora_modules lora_target lora_target_linear target_modules",
    "precision": "compute_dtype dtype mixed_precision torch_dtype",
    "activation_offload": "activation_offloading enable_activation_offloading",
    "gradient_checkpointing": "enable_activation_checkpointing use_gradient_checkpointing",
    "per_device_train_batch_size": (
        "batch_size micro_batch_size per_gpu_train_batch_size train_batch_size "
        "train_micro_batch_size_per_gpu"
    ),
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation",
    "num_train_epochs": "epochs max_epochs num_epochs",
    "max_steps": "iters max_iters max_steps_per_epoch max_train_steps num_steps num_train_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule lr_scheduler scheduler",
    "warmup_steps": "num_warmup_steps warmup_iters warmup_proportion",
    "max_grad_norm": "clip_grad_norm grad_clip gradient_clipping",
    "optim": "optimizer",
    "save_steps": "checkpointing_steps save_interval saves_per_epoch",
    "eval_steps": "eval_interval evals_per_epoch",
    "logging_steps": "log_every_n_steps log_interval",
    "save_total_limit": "max_checkpoints_to_keep save_total",
    "report_to": "log_to with_tracking",
    "run_name": "experiment_name name wandb_name wandb_run_name",
    "output_dir": "out_dir output save_dir save_path",
    "resume_from_checkpoint": "auto_resume_from_checkpoints resume resume_from",
    "deepspeed": "deepspeed_config deepspeed_config_file ds_config",
    "nvme_path": "nvme_dir offload_dir",
    "use_liger_kernel": "enable_liger_kernel liger_kernel use_liger",
    "dataloader_num_workers": "num_workers preprocessing_num_workers",
    "seed": "random_seed",
    "max_shard_size": "export_size shard_size",
    "train_sampling_strategy": "group_by_length",
}
FLAGS = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}
# What this trainer has no flag for, and what to do.
ADVICE = {
    "stage": "this trainer does supervised fine-tuning alone; leave it out",
    "do_sample": "no text is generated while training; leave it out",
    "predict_with_generate": "no text is generated while training; leave it out",
    "load_in_4bit": "weights are bf16 and offloaded; --method lora with --deepspeed auto",
    "load_in_8bit": "weights are bf16 and offloaded; --method lora with --deepspeed auto",
    "quantization_bit": "weights are bf16 and offloaded; --method lora with --deepspeed auto",
    "quant_bits": "weights are bf16 and offloaded; --method lora with --deepspeed auto",
    "overwrite_cache": "tokens are cached by the content of file and tokenizer; leave it out",
    "max_samples": "a file with fewer rows, or --dataset FILE:SHARE",
    "gpus": "launch/supervise.py --num_gpus N, or deepspeed --num_gpus N",
    "num_gpus": "launch/supervise.py --num_gpus N, or deepspeed --num_gpus N launch/train.py",
    "num_processes": "launch/supervise.py --num_gpus N, or deepspeed --num_gpus N",
    "nproc_per_node": "launch/supervise.py --num_gpus N, or deepspeed --num_gpus N",
    "wandb_project": "export WANDB_PROJECT=NAME",
    "wandb_entity": "export WANDB_ENTITY=NAME",
    "adapter_name_or_path": "--resume_from_checkpoint goes on with an adapter",
    "zero_stage": "--deepspeed NAME.json: all of them are stage 3",
}
