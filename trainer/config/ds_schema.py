"""The keys of a DeepSpeed 0.19.8 configuration: names, types and limits. Does not import torch.

DeepSpeed reads some blocks with classes of its own. Their keys, aliases and limits come from its
source, which importing would import torch. The other blocks it reads key by key, and ignores what
is misspelt: their tables are here.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import RunError, make_line


@dataclass(frozen=True)
class Key:
    """name: as DeepSpeed's documentation has it. above, low, high: limits of a number."""

    name: str
    kind: "type | Block"
    above: float | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def limits(self) -> str:
        """The limits as text."""
        parts = {"more than ": self.above, "at least ": self.low, "at most ": self.high}
        return " and ".join(f"{what}{limit}" for what, limit in parts.items() if limit is not None)


@dataclass(frozen=True)
class Block:
    """keys: by every name that DeepSpeed takes. typed: read by a class of DeepSpeed's.

    A typed block takes texts for numbers and switches, and "auto" in it is the key's default.
    """

    keys: dict[str, Key] = field(default_factory=dict)
    typed: bool = False


# The classes of DeepSpeed that read a block: the file below deepspeed/, the class.
_OFFLOAD, _PRECISION = "runtime/zero/offload_config.py", "runtime/precision_config.py"
_MONITOR = "monitor/config.py"
_CLASSES = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "bf16": (_PRECISION, "DeepSpeedBF16Config"),
    "fp16": (_PRECISION, "DeepSpeedFP16Config"),
    "tensorboard": (_MONITOR, "TensorBoardConfig"),
    "wandb": (_MONITOR, "WandbConfig"),
    "csv_monitor": (_MONITOR, "CSVConfig"),
    "comet": (_MONITOR, "CometConfig"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
    "compile": ("compile/config.py", "CompileConfig"),
}
# Those of blocks inside of these, by the name that stands in an annotation: the file.
_INNER = {
    "DeepSpeedZeroOffloadParamConfig": _OFFLOAD,
    "DeepSpeedZeroOffloadOptimizerConfig": _OFFLOAD,
    "DeepSpeedZeroLeafModuleConfig": "runtime/zero/leaf_module_config.py",
}
_KINDS = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Path": str,
    "list": list,
    "ZeroStageEnum": int,
    "OffloadDeviceEnum": str,
}
_LIMITS = {"gt": "above", "ge": "low", "le": "high"}
# Its own checks, which are code: limits of what the run divides by.
_CHECKED = {
    "loss_scale": {"low": 0},
    "loss_scale_window": {"low": 1},
    "min_loss_scale": {"low": 1},
    "initial_scale_power": {"low": 0},
}


def _plain(names: str, kind: "type | Block", **limits: Any) -> dict[str, Key]:
    """Return the keys of these names."""
    return {name: Key(name, kind, **limits) for name in names.split()}


def _block(keys: dict[str, Any]) -> Block:
    """Return the block of these keys. A mapping among them is a block inside."""
    return Block(
        {
            name: key if isinstance(key, Key) else Key(name, _block(key))
            for name, key in keys.items()
        }
    )


_DTYPES = ("fp32", "fp16", "bf16")
LIMITS = ("hbm", "ram", "nvme")
PLACES = ("weights_in_hbm", "gradients_in_hbm", "states_in_hbm", "states_in_ram")
_OTHERS: dict[str, Any] = {
    **_plain(
        "wall_clock_breakdown memory_breakdown dump_state prescale_gradients disable_allgather "
        "disable_python_gc zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "dataloader_drop_last managed_gradient_accumulation use_data_before_expert_parallelism",
        bool,
    ),
    **_plain(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "steps_per_print sequence_parallel_size",
        int,
        low=1,
    ),
    **_plain("vocabulary_size", int, low=0),
    **_plain("gradient_clipping", float, low=0),
    **_plain("gradient_predivide_factor", float, above=0),
    **_plain("communication_data_type seq_parallel_communication_data_type", str, choices=_DTYPES),
    **_plain("gradient_allreduce_op log_level", str),
    # Blocks of what this trainer does not do: taken where they are switched off.
    **_plain(
        "data_efficiency hybrid_engine autotuning tensor_parallel expert_parallel pipeline", dict
    ),
    # Blocks of their own.
    "aio": {
        **_plain("block_size queue_depth intra_op_parallelism", int, low=1),
        **_plain("single_submit overlap_events use_gds", bool),
        # Its name before DeepSpeed 0.15.
        "thread_count": Key("intra_op_parallelism", int, low=1),
    },
    "optimizer": _plain("type", str) | _plain("params", dict) | _plain("legacy_fusion", bool),
    "scheduler": _plain("type", str) | _plain("params", dict),
    "data_types": {
        **_plain(
            "grad_accum_dtype param_dtype buffer_dtype",
            str,
            choices=(*_DTYPES, "float32", "float16", "bfloat16"),
        ),
        **_plain("keep_in_fp32_modules", list),
    },
    "torch_autocast": {
        **_plain("enabled", bool),
        **_plain("dtype", str),
        **_plain("lower_precision_safe_modules", list),
    },
    "checkpoint": {
        **_plain("tag_validation", str, choices=("warn", "ignore", "fail")),
        **_plain("load_universal use_node_local_storage checkpoint_serialization", bool),
        **_plain("parallel_write writer", dict),
    },
    "activation_checkpointing": {
        **_plain(
            "partition_activations contiguous_memory_optimization cpu_checkpointing "
            "synchronize_checkpoint_boundary profile",
            bool,
        ),
        **_plain("number_checkpoints", int, low=0),
    },
    "flops_profiler": {
        **_plain("enabled detailed", bool),
        **_plain("profile_step module_depth top_modules", int),
        **_plain("recompute_fwd_factor", float),
        **_plain("output_file", str),
    },
    "timers": {"throughput": _plain("enabled synchronized", bool)},
    # Ours: limits, and what the plan makes of them (plan/tiers.py). DeepSpeed takes no notice.
    "tiers": {**_plain(" ".join(LIMITS), str), **_plain(" ".join(PLACES), int, low=0)},
}

# What DeepSpeed can do and this trainer does not: the value that says so, and why.
_SENDS_LESS = "it rounds what the ranks send each other: another model would be trained"
_NOT_FP32 = "the optimizer's state is fp32 here"
_OWN_CHECKPOINTING = (
    "no model of transformers calls DeepSpeed's checkpointing; use --gradient_checkpointing and "
    "--activation_offload"
)
_NO_SUCH_ENGINE = "this trainer runs ZeRO-3 alone"
OFF: dict[str, tuple[Any, str]] = {
    "zero_optimization.zero_quantized_weights": (False, _SENDS_LESS),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _SENDS_LESS),
    "zero_optimization.zero_quantized_gradients": (False, _SENDS_LESS),
    "zero_optimization.compute_grad_norm": (True, "DeepSpeed takes it in stages 1 and 2 alone"),
    "zero_optimization.zenflow": (None, "it updates a part of the weights: not AdamW"),
    "zero_optimization.offload_optimizer.super_offload": (False, "this trainer's own step is run"),
    "bf16.bf16_master_weights_and_grads": (False, _NOT_FP32),
    "bf16.bf16_optimizer_states": (False, _NOT_FP32),
    "fp16.fp16_master_weights_and_grads": (False, _NOT_FP32),
    "torch_autocast.enabled": (False, "--precision decides"),
    "compile.deepcompile": (False, "it replaces the engine whose memory this trainer plans"),
    "activation_checkpointing.partition_activations": (False, _OWN_CHECKPOINTING),
    "activation_checkpointing.contiguous_memory_optimization": (False, _OWN_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": (False, _OWN_CHECKPOINTING),
    "aio.use_gds": (False, "nothing compares its reads with what was written"),
    "gradient_allreduce_op": ("mean", "DeepSpeed does not take it in stage 3"),
    "sequence_parallel_size": (1, _NO_SUCH_ENGINE),
    "data_efficiency.enabled": (False, "the order of the rows is this trainer's"),
    "hybrid_engine.enabled": (False, _NO_SUCH_ENGINE),
    "autotuning.enabled": (False, "--deepspeed auto chooses by the plan"),
    "tensor_parallel.autotp_size": (1, _NO_SUCH_ENGINE),
    "tensor_parallel.tp_size": (1, _NO_SUCH_ENGINE),
    "expert_parallel.enabled": (False, _NO_SUCH_ENGINE),
}
# Keys that DeepSpeed 0.19.8 refuses, or that name what ZeRO-3 offload does not have.
_REMOVED = "DeepSpeed 0.19.8 has it no more"
GONE = {
    **dict.fromkeys(
        (
            "amp",
            "nebula",
            "elasticity",
            "eigenvalue",
            "sparse_attention",
            "sparse_gradients",
            "compression_training",
            "curriculum_learning",
            "graph_harvesting",
            "quantize_training",
            "progressive_layer_drop",
            "mics_shard_size",
            "mics_hierarchical_params_gather",
            "zeropp_loco_param",
        ),
        _REMOVED,
    ),
    **dict.fromkeys(
        ("fp8", "float8"),
        "bf16, fp16 or fp32: ZeRO-3 offload keeps its parameters in one of these",
    ),
    "weight_quantization": _NOT_FP32,
    "datastates_ckpt": "checkpoints are this trainer's",
}
# Names of earlier DeepSpeeds for a switch, which 0.19.8 takes: the new name.
SWITCHES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
RENAMED = {"stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save"}
IGNORED = ("cpu_offload_use_pin_memory",)  # by DeepSpeed too

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
    "data_types": {"keep_in_fp32_modules", "grad_accum_dtype"},
    "bf16": {"enabled"},
    "fp16": {"enabled"},
    "tiers": {*LIMITS, *PLACES},
}


@functools.cache
def config() -> Block:
    """Return the whole configuration."""
    typed = {name: Key(name, _read(*class_)) for name, class_ in _CLASSES.items()}
    # bfloat16: the name before bf16.
    return _block({**_OTHERS, **typed, "bfloat16": typed["bf16"]})


@functools.cache
def _read(file: str, class_name: str) -> Block:
    """Return the block that a class of DeepSpeed's reads."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        raise RunError("DeepSpeed is not installed", fix=make_line("setup"))
    source = Path(spec.origin).with_name(file.partition("/")[0]) / file.partition("/")[2]
    definition = next(
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    keys = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            key = _key(node.target.id, node)
            keys[node.target.id] = keys[key.name] = key
    return Block(keys, typed=True)


def _key(name: str, node: ast.AnnAssign) -> Key:
    """Return the key of one annotated field."""
    text = ast.unparse(node.annotation).removeprefix("Optional[")
    text = text.partition("[")[0].rstrip("]").lower() if text.startswith("List[") else text
    text = text.rstrip("]")
    kind = _read(_INNER[text], text) if text in _INNER else _KINDS.get(text, dict)
    options: dict[str, Any] = dict(_CHECKED.get(name, {}))
    for keyword in node.value.keywords if isinstance(node.value, ast.Call) else ():
        if keyword.arg == "alias":
            name = ast.literal_eval(keyword.value)
        elif keyword.arg in _LIMITS:
            options[_LIMITS[keyword.arg]] = ast.literal_eval(keyword.value)
    return Key(name, kind, **options)
