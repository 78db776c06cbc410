"""The DeepSpeed JSON: what is refused, and what "auto" becomes."""

import dataclasses
import json

import pytest

from trainer import prepare
from trainer.config.device import choose_grad_accum_dtype, choose_precision
from trainer.config.ds_config import CONFIGS, DeepSpeedConfig, ZeroShapes, read
from trainer.config.settings import resolve
from trainer.errors import RunError
from trainer.prepare import Prepared

SHIPPED = sorted(p.name for p in CONFIGS.glob("*.json"))
LLAMA_8B = ZeroShapes(
    layer=218_112_000,
    layer_tensors=9,
    largest=525_336_576,
    trainable=8_030_261_248,
    largest_trainable=525_336_576,
    itemsize=2,
)


def shipped(name="ds_z3_nvme.json"):
    return read(CONFIGS / name)


def test_shipped_are_five():
    assert SHIPPED == [
        "ds_z3.json",
        "ds_z3_infinity.json",
        "ds_z3_nvme.json",
        "ds_z3_nvme_optimizer.json",
        "ds_z3_offload.json",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_has_a_comment(name):
    lines = (CONFIGS / name).read_text().splitlines()
    commented = 0
    for before, line in zip(lines, lines[1:]):
        commented += line.strip().startswith('"') and before.strip().startswith("//")
    assert commented >= 10


def test_adapters_stay_on_the_gpu(tmp_path):
    """But not where parameters are on NVMe.

    Nor where frozen matrices that are as small as the adapters would stay with them.
    """
    r64 = dataclasses.replace(
        LLAMA_8B, trainable=167_772_160, largest_trainable=917_504, itemsize=2
    )
    for name, shapes, threshold in (
        ("ds_z3_offload.json", r64, 917_505),
        ("ds_z3_nvme.json", r64, 100_000),
        ("ds_z3_offload.json", dataclasses.replace(r64, small_frozen=10**9), 100_000),
        ("ds_z3_offload.json", LLAMA_8B, 100_000),
    ):
        zero = DeepSpeedConfig.load(name).resolved(shapes, 1, tmp_path).zero
        assert zero["stage3_param_persistence_threshold"] == threshold, (name, shapes)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("world", [1, 8])
def test_auto_leaves_nothing(name, world, tmp_path):
    config = DeepSpeedConfig.load(name)
    settings = resolve(["--model_name_or_path", "x", "--precision", "fp32"])
    config.agree_with(settings)
    choose_precision(settings, config, False)
    done = config.resolved(LLAMA_8B, world, tmp_path)
    text = json.dumps(done.zero)
    assert '"auto"' not in text
    zero = done.zero
    assert zero["stage3_prefetch_bucket_size"] == LLAMA_8B.layer
    layers = (
        2 * LLAMA_8B.layer if name == "ds_z3_nvme.json" else 3 * LLAMA_8B.layer + LLAMA_8B.largest
    )
    assert zero["stage3_max_live_parameters"] == layers
    assert zero["stage3_max_reuse_distance"] >= 2 * LLAMA_8B.layer
    assert zero["reduce_bucket_size"] <= 5e8 and zero["sub_group_size"] <= 1e8
    if "nvme" in name:
        assert zero["offload_optimizer"]["nvme_path"] == str(tmp_path)
    if name == "ds_z3_nvme.json":
        assert (
            zero["offload_param"]["buffer_size"] >= LLAMA_8B.largest / world
            and zero["offload_param"]["max_in_cpu"] == 0
        )
        assert zero["offload_param"]["buffer_count"] >= 3 * LLAMA_8B.layer_tensors + 2
    done.check_buffers(LLAMA_8B, world)
    assert done.locked_bytes(LLAMA_8B) >= 0 and done.ring_bytes(LLAMA_8B, world) >= 0


@pytest.mark.parametrize("device, expected", [("nvme", 2 * LLAMA_8B.layer), ("cpu", 10**9)])
@pytest.mark.parametrize("given", [{}, {"stage3_max_reuse_distance": 10**9}])
def test_what_stays_on_the_gpu_does_not_take_all_buffers(device, expected, given):
    path = {"nvme_path": "auto"} if device == "nvme" else {}
    zero = {"stage": 3, "offload_param": {"device": device, **path}, **given}
    made = DeepSpeedConfig({"zero_optimization": zero}, "my.json").resolved(LLAMA_8B, 1, "swap")
    assert made.zero.get("stage3_max_reuse_distance", 10**9) == expected


@pytest.mark.parametrize(
    "name, flags, expected",
    [
        ("ds_z3_offload.json", [], "auto"),
        ("ds_z3_nvme.json", [], "0"),
        ("ds_z3_offload.json", ["--kept_layers", "3"], "0"),
        ("ds_z3_offload.json", ["--gradient_checkpointing", "false"], "0"),
        ("ds_z3_offload.json", ["--disable_optimizations", "all"], "0"),
        ("tests/data/deepspeed/llama_factory.json", [], "0"),
    ],
)
def test_weights_stay_where_they_can(name, flags, expected):
    words = ["--model_name_or_path", "x", "--precision", "bf16", "--kept_weights", "auto", *flags]
    settings = resolve(words)
    prepared = Prepared(settings, DeepSpeedConfig.load(name), None, True, "bf16", "")
    prepare.check_kept_weights(prepared)
    assert settings.kept_weights == expected
    assert expected == "auto" or settings.sources["kept_weights"].startswith("needs ")


@pytest.mark.parametrize(
    "name, param, optimizer",
    [
        ("ds_z3.json", "none", "none"),
        ("ds_z3_offload.json", "cpu", "cpu"),
        ("ds_z3_nvme_optimizer.json", "cpu", "nvme"),
        ("ds_z3_nvme.json", "nvme", "nvme"),
    ],
)
def test_where_things_are(name, param, optimizer):
    config = DeepSpeedConfig.load(name)
    assert (config.device("param"), config.device("optimizer")) == (param, optimizer)
    assert config.uses_nvme() == ("nvme" in (param, optimizer))
    bytes_of_8b = config.swap_bytes(LLAMA_8B.trainable, LLAMA_8B, 1)
    nvme = 2 * (param == "nvme") + (12 if param == "nvme" else 10) * (optimizer == "nvme")
    assert bytes_of_8b == pytest.approx(nvme * LLAMA_8B.trainable, abs=2**20)


def edit(path, value):
    config = shipped()
    node = config
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    if value is None:
        node.pop(last)
    else:
        node[last] = value
    return config


@pytest.mark.parametrize(
    "path, value, words",
    [
        (
            "zero_optimisation",
            {"stage": 3},
            ["zero_optimisation", "did you mean zero_optimization"],
        ),
        ("aio.que_depth", 8, ["aio.que_depth", "did you mean queue_depth"]),
        ("aio.queue_depth", "lots", ["aio.queue_depth", "lots", "int"]),
        ("aio.queue_depth", 0, ["aio.queue_depth"]),
        ("aio", 3, ["aio"]),
        ("aio.block_size", "auto", ["auto"]),
        ("zero_optimization.stage", 2, ["stage 3", "stage 2"]),
        ("zero_optimization.stage", None, ["stage"]),
        ("zero_optimization", None, ["no zero_optimization"]),
        ("zero_optimization.offload_param.nvme_path", None, ["nvme_path"]),
        ("zero_optimization.offload_optimizer.nvme_path", None, ["nvme_path"]),
        ("zero_optimization.offload_param.device", "nvm", ["device", "did you mean nvme"]),
        (
            "zero_optimization.stage3_prefetch_bucket_sizes",
            1,
            ["did you mean stage3_prefetch_bucket_size"],
        ),
        ("zero_optimization.sub_group_size", -1, ["out of range", "at least 0"]),
        ("zero_optimization.sub_group_size", "big", ["big"]),
        ("fp8", {"enabled": True}, ["fp8"]),
        ("bf16.enabled", "perhaps", ["bf16.enabled"]),
        ("aio.use_gds", True, ["aio.use_gds is not supported"]),
    ],
)
def test_refused(path, value, words):
    with pytest.raises(RunError) as error:
        DeepSpeedConfig(edit(path, value), "my.json")
    for word in ["my.json", *words]:
        assert word in str(error.value)
    assert error.value.code == 2


def test_contradiction_with_the_recipe():
    config = DeepSpeedConfig(edit("train_micro_batch_size_per_gpu", 4), "my.json")
    settings = resolve(["--model_name_or_path", "x", "--per_device_train_batch_size", "2"])
    with pytest.raises(RunError, match="contradicts"):
        config.agree_with(settings)


def test_null_is_no_key():
    config = shipped()
    config["zero_optimization"]["offload_param"]["device"] = None
    config["aio"] = {"queue_depth": None}
    config["bf16"] = None
    made = DeepSpeedConfig(config, "x.json")
    assert made.device("param") == "none" and made.values["aio"] == {}


def test_json_too_deep_to_read(tmp_path):
    (tmp_path / "deep.json").write_text('{"a": ' * 5000)
    with pytest.raises(RunError, match="not readable as JSON"):
        read(tmp_path / "deep.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_an_editor(tmp_path, encoding):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"aio": {}}), encoding=encoding)
    if encoding == "utf-16":
        with pytest.raises(RunError, match="JSON in UTF-8"):
            read(path)
    else:
        assert read(path) == {"aio": {}}


@pytest.mark.parametrize("name", ["x" * 5000, "/", "", "a" * 300 + ".json", "{}"])
def test_no_file_of_that_name(name):
    with pytest.raises(RunError, match="no DeepSpeed configuration"):
        DeepSpeedConfig.load(name)


def test_small_buffers_are_refused(tmp_path):
    path = "zero_optimization.offload_param.buffer_size"
    with pytest.raises(RunError, match="buffer_size"):
        config = DeepSpeedConfig(edit(path, 10**6), "my.json")
        config.resolved(LLAMA_8B, 1, tmp_path).check_buffers(LLAMA_8B, 1)


def found(name):
    return DeepSpeedConfig.load(name).where


def test_find_looks_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        found("ds_z3.json") == CONFIGS / "ds_z3.json" and found("ds_z3") == CONFIGS / "ds_z3.json"
    )
    (tmp_path / "ds_z3.json").write_text((CONFIGS / "ds_z3.json").read_text())
    assert str(found("ds_z3.json")) == "ds_z3.json"
    with pytest.raises(RunError, match="did you mean ds_z3_nvme.json"):
        found("ds_z3_nvm.json")


@pytest.mark.parametrize(
    "text, word",
    [("{", "not readable"), ("[1]", "not a DeepSpeed"), ('{"aio": {}, "aio": {}}', "twice")],
)
def test_unreadable(tmp_path, text, word):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(RunError, match=word):
        read(path)


@pytest.mark.parametrize(
    "flags, gpu, hardware_has, expected",
    [
        ([], False, False, "fp32"),
        ([], False, True, "bf16"),
        ([], True, True, "bf16"),
        ([], True, False, "fp16"),
        (["--precision", "fp32"], True, True, "fp32"),
        (["--bf16", "false"], True, True, "fp32"),
        (["--bf16"], False, False, "bf16"),
    ],
)
def test_precision(monkeypatch, flags, gpu, hardware_has, expected):
    monkeypatch.setattr("trainer.system.hardware.cpu_has_bf16", lambda: hardware_has)
    monkeypatch.setattr("trainer.system.hardware.gpu_has_bf16", lambda: hardware_has)
    config = DeepSpeedConfig.load("ds_z3_nvme.json")
    chosen, _ = choose_precision(resolve(["--model_name_or_path", "x", *flags]), config, gpu)
    assert chosen == expected
    for name in ("bf16", "fp16"):
        assert config.values[name]["enabled"] == (expected == name)


@pytest.mark.parametrize(
    "flags, gpu",
    [(["--fp16"], False), (["--bf16", "--fp16"], True), (["--precision", "bf16"], True)],
)
def test_precision_refused(monkeypatch, flags, gpu):
    monkeypatch.setattr("trainer.system.hardware.gpu_has_bf16", lambda: False)
    with pytest.raises(RunError):
        choose_precision(
            resolve(["--model_name_or_path", "x", *flags]),
            DeepSpeedConfig.load("ds_z3_nvme.json"),
            gpu,
        )


@pytest.mark.parametrize(
    "asked, precision, method, accumulation, expected",
    [
        (None, "bf16", "full", 15, "bf16"),
        (None, "bf16", "full", 16, "fp32"),
        (None, "fp16", "lora", 1, "fp16"),
        (None, "fp16", "lora", 2, "fp32"),
        ("bf16", "bf16", "lora", 64, "bf16"),
        ("fp32", "bf16", "full", 1, "fp32"),
        (None, "fp32", "full", 1, "fp32"),
    ],
)
def test_grad_accum_dtype(asked, precision, method, accumulation, expected):
    assert choose_grad_accum_dtype(asked, precision, method, accumulation) == expected


@pytest.mark.parametrize("asked, precision", [("bf16", "fp16"), ("bf16", "fp32")])
def test_grad_accum_dtype_refused(asked, precision):
    with pytest.raises(RunError, match="neither fp32 nor the run's precision"):
        choose_grad_accum_dtype(asked, precision, "full", 1)
