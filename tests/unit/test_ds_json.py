"""JSONs in the shape that other trainers ship them: taken as DeepSpeed 0.19.8 takes them."""

import copy
import json
import logging

import pytest

from trainer import ROOT
from trainer.config import ds_schema
from trainer.config.device import choose_precision
from trainer.config.ds_config import DeepSpeedConfig, ZeroShapes
from trainer.config.settings import resolve
from trainer.errors import RunError

JSONS = sorted((ROOT / "tests" / "data" / "deepspeed").glob("*.json"))
SHAPES = ZeroShapes(
    layer=10**6,
    layer_tensors=7,
    largest=10**6,
    trainable=10**7,
    largest_trainable=10**6,
    itemsize=2,
)
MODEL = ["--model_name_or_path", "x"]


def taken(values, *flags, world=1):
    """Return (configuration, settings) of a JSON and flags."""
    config = DeepSpeedConfig(copy.deepcopy(values), "my.json")
    settings = resolve([*MODEL, *flags])
    config.agree_with(settings, world)
    return config, settings


def refused(values, *words, flags=(), world=1):
    with pytest.raises(RunError) as error:
        config, settings = taken(values, *flags, world=world)
        choose_precision(settings, config, True)
    assert error.value.code == 2
    for word in ("my.json", *words):
        assert word in str(error.value), error.value


def json_of(name):
    return json.loads((ROOT / f"tests/data/deepspeed/{name}.json").read_text())


def with_zero(**keys):
    return {"zero_optimization": {"stage": 3, **keys}}


def deepspeed_reads(values):
    """Return what DeepSpeed's own classes make of a configuration, or None where they refuse it."""
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.config import get_zero_config

    values = copy.deepcopy(values)
    try:
        models = [
            read(values).model_dump()
            for read in (get_zero_config, get_float16_config, get_bfloat16_config)
        ]
    except (AssertionError, TypeError, ValueError):
        return None
    for old in (*ds_schema.SWITCHES, *ds_schema.RENAMED, *ds_schema.IGNORED):
        models[0].pop(old, None)
    return [*models, get_aio_config(values)]


def test_ten_are_here():
    assert len(JSONS) == 10


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_taken_as_deepspeed_takes_it(path):
    values = json.loads(path.read_text())
    config, settings = taken(values, world=4)
    assert deepspeed_reads(config.values) == deepspeed_reads(values)
    resolved = config.resolved(SHAPES, 4, "swap").values
    assert "optimizer" not in resolved and "scheduler" not in resolved
    assert '"auto"' not in json.dumps(resolved["zero_optimization"])


@pytest.mark.parametrize(
    "keys",
    [
        {"max_live_parameters": 5, "prefetch_bucket_size": 7, "module_granularity_threshold": 3},
        {"max_live_parameters": 5, "stage3_max_live_parameters": 5},
        {"stage3_max_live_parameters": "500", "overlap_comm": "yes", "reduce_scatter": 0},
        {"max_live_parameters": "5e8"},
        {"max_live_parameters": 5.5},
        {"overlap_comm": 2},
        {"stage": "3"},
        {"stage": 3.0},
        {"stage": 4},
        {"cpu_offload": True},
        {"cpu_offload": False, "cpu_offload_param": True, "cpu_offload_use_pin_memory": False},
        {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}},
        {"cpu_offload": False, "offload_optimizer": {"device": "cpu"}},
        {"stage3_gather_fp16_weights_on_model_save": True},
        {
            "stage3_gather_fp16_weights_on_model_save": True,
            "gather_16bit_weights_on_model_save": True,
        },
        {"offload_param": {"device": "CPU"}},
        {"offload_param": {}},
        {"offload_param": {"device": "auto", "pin_memory": "auto", "max_in_cpu": "auto"}},
        {"offload_param": "cpu"},
        {"offload_param": "auto"},
        {"offload_optimizer": {"device": "cpu", "ratio": "0.5"}},
        {"offload_optimizer": {"device": "cpu", "ratio": 1.5}},
        {"offload_optimizer": {"device": "cpu", "buffer_size": 5}},
        {"offload_optimizer": {"device": "cpu", "nvme_path": 5}},
        {"leaf_module": {"classes": "A", "names": "auto"}},
        {"reduce_bucket_size": 0},
        {"sub_group_size": 0, "stage3_module_granularity_threshold": -1},
        {"stage3_prefetch_bucket_size": -1},
        {"stage3_model_persistence_threshold": "auto", "overlap_comm": "auto"},
        {"contiguous_gradients": []},
    ],
    ids=str,
)
def test_a_key_means_what_it_means_to_deepspeed(keys):
    values = with_zero(**keys)
    expected = deepspeed_reads(values)
    if expected is None:
        refused(values)
    else:
        assert deepspeed_reads(taken(values)[0].values) == expected


@pytest.mark.parametrize(
    "values, words",
    [
        ({"amp": {"enabled": False}}, ["amp", "has it no more"]),
        ({"elasticity": {}}, ["elasticity"]),
        ({"compile": {"deepcompile": True}}, ["compile.deepcompile"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine.enabled"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size"]),
        ({"expert_parallel": {"enabled": True}}, ["expert_parallel.enabled"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency.enabled"]),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            ["partition_activations", "--gradient_checkpointing"],
        ),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled", "--precision"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads"]),
        (with_zero(stage=2), ["stage 3", "stage 2"]),
        (with_zero(stage="auto"), ["stage 3", "stage 0"]),
        (with_zero(zenflow={"topk_ratio": 0.1}), ["zenflow"]),
        (with_zero(zero_quantized_weights=True), ["zero_quantized_weights"]),
        (with_zero(mics_shard_size=2), ["mics_shard_size"]),
        (with_zero(offload_optimizer={"device": "cpu", "super_offload": True}), ["super_offload"]),
        ({"zero_optimization": True}, ["an object"]),
        ({"steps_per_print": 0}, ["steps_per_print", "at least 1"]),
        ({"communication_data_type": "fp64"}, ["communication_data_type", "bf16"]),
        ({"data_types": {"grad_accum_dtype": "int8"}}, ["grad_accum_dtype", "fp32"]),
        ({"optimizer": {"type": "Lion"}}, ["AdamW", "Lion"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["adam_w_mode"]),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, ["max_grad_norm"]),
        ({"optimizer": {"params": {"betas": 0.9}}}, ["betas", "two numbers"]),
        ({"optimizer": {"params": {"lr": "fast"}}}, ["lr", "fast", "number"]),
        ({"scheduler": {"type": "OneCycle"}}, ["OneCycle", "WarmupDecayLR"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1}}}, ["warmup_min_lr"]),
        ({"bf16": {"enabled": True}, "bfloat16": {}}, ["the same key"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["two precisions"]),
        ({"csv_monitor": {"outputpath": "x"}}, ["did you mean output_path"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu\0"}}}, ["device"]),
        (
            with_zero(offload_param={"device": "nvme", "nvme_path": "/a\0"}),
            ["nvme_path", "NUL"],
        ),
        (with_zero(offload_param={"device": "nvme", "nvme_path": "\ud800"}), ["surrogate"]),
        ({3: 1}, ["unknown key 3"]),
        ({"aio": {"thread_count": 2, "intra_op_parallelism": 2}}, ["the same key"]),
    ],
    ids=str,
)
def test_refused_by_name(values, words):
    refused({**with_zero(), **values}, *words)


def test_numbers_of_the_json_are_taken_where_no_flag_says_one():
    _, settings = taken(json_of("deepspeed_examples"), world=2)
    assert settings.learning_rate == 1e-5 and settings.adam_beta2 == 0.95
    assert (settings.weight_decay, settings.max_grad_norm) == (0.1, 1.0)
    assert settings.per_device_train_batch_size == 4
    assert settings.gradient_accumulation_steps == 2  # 16 rows, 4 at a time, on 2 ranks
    assert settings.sources["learning_rate"] == "my.json"
    assert "learning_rate" in settings.training_arguments()


def test_a_schedule_is_taken_where_no_recipe_names_one():
    assert taken(json_of("llava"))[1].lr_scheduler_type == "constant_with_warmup"
    flags = ["--lr_scheduler_type", "cosine", "--warmup_steps", "3"]
    assert taken(json_of("llava"), *flags)[1].lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    "values, flags",
    [
        ({"train_micro_batch_size_per_gpu": 4}, ["--per_device_train_batch_size", "2"]),
        ({"gradient_clipping": 0.5}, ["--max_grad_norm", "1"]),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, ["--grad_accum_dtype", "bf16"]),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ["--learning_rate", "1e-4"]),
        ({"scheduler": {"params": {"total_num_steps": 7}}}, ["--max_steps", "8"]),
        ({"train_batch_size": 7}, ["--per_device_train_batch_size", "2"]),
        ({"train_batch_size": 1}, []),
        ({"train_batch_size": 6, "train_micro_batch_size_per_gpu": "auto"}, []),
        (
            {
                "train_batch_size": 8,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
            },
            [],
        ),
    ],
    ids=str,
)
def test_contradictions(values, flags):
    refused({**with_zero(), **values}, "contradicts", flags=flags, world=2)


@pytest.mark.parametrize(
    "values, world, expected",
    [
        ({"train_batch_size": 16}, 2, (8, 1)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, 2, (2, 4)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1}, 2, (1, 8)),
        ({"train_micro_batch_size_per_gpu": 3}, 2, (3, 1)),
    ],
)
def test_what_is_missing_of_a_batch_follows_as_in_deepspeed(values, world, expected):
    _, settings = taken({**with_zero(), **values}, world=world)
    made = (settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    assert made == expected


def test_a_resumption_on_other_ranks():
    flags = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    values = {**with_zero(), "train_batch_size": 16}
    refused(values, "contradicts", flags=flags, world=1)
    taken(values, *flags, "--resume_from_checkpoint", "auto", world=1)


@pytest.mark.parametrize(
    "bf16, fp16, expected",
    [
        ({"enabled": "auto"}, {"enabled": False}, "bf16"),
        ({"enabled": False}, {}, "fp32"),
        ({"enabled": False}, {"enabled": True}, "fp16"),
        ({"enabled": True}, {"enabled": False}, "bf16"),
    ],
)
def test_precision_of_the_json(monkeypatch, bf16, fp16, expected):
    monkeypatch.setattr("trainer.system.hardware.gpu_has_bf16", lambda: True)
    config, settings = taken({**with_zero(), "bf16": bf16, "fp16": fp16})
    assert choose_precision(settings, config, True)[0] == expected


@pytest.mark.parametrize(
    "said, expected", [("fp32", "fp32"), ("Float32", "fp32"), ("bfloat16", "bf16"), ("auto", None)]
)
def test_grad_accum_dtype_of_the_json(said, expected):
    config, settings = taken({**with_zero(), "data_types": {"grad_accum_dtype": said}})
    assert settings.grad_accum_dtype == expected and config.values["data_types"] == {}


def test_a_precision_that_the_json_switches_off():
    refused({**with_zero(), "bf16": {"enabled": False}}, "switched off", flags=["--bf16"])


def nvme(param, optimizer):
    return with_zero(
        offload_param={"device": "nvme", "nvme_path": param},
        offload_optimizer={"device": "nvme", "nvme_path": optimizer},
    )


@pytest.mark.parametrize(
    "param, optimizer, flags, expected",
    [
        ("/disk/a", "/disk/a", [], "/disk/a"),
        ("/disk/a", "auto", [], "/disk/a"),
        ("auto", "auto", [], ".swap"),
        ("/disk/a", "/disk/b", ["--nvme_path", "/disk/c"], "/disk/c"),
    ],
)
def test_nvme_path_of_the_json(param, optimizer, flags, expected):
    assert taken(nvme(param, optimizer), *flags)[1].nvme_path == expected


def test_two_nvme_paths():
    refused(nvme("/disk/a", "/disk/b"), "two nvme_path", "/disk/a and /disk/b", "--nvme_path")


def test_a_short_json_has_a_plan():
    """Stage 3 and two devices: all else is DeepSpeed's default."""
    from trainer.plan.machine import Machine
    from trainer.plan.model_shapes import built_in
    from trainer.plan.workload import TrainingJob, Workload

    values = with_zero(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    job = TrainingJob(built_in("smollm2-135m"))
    work = Workload(
        job, Machine(gpus=1, gpu_memory=8e10, ram=1e12), DeepSpeedConfig(values, "my.json"), 1
    )
    assert work.zero["stage3_max_live_parameters"] == 10**9
