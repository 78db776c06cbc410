"""Flags, recipes and their layers."""

import re

import pytest

from trainer import ROOT
from trainer.config import ds_schema, elsewhere, packages
from trainer.config.ds_config import DeepSpeedConfig
from trainer.config.flags import (
    LEARNING_RATE,
    REFUSED,
    RETIRED,
    all_keys,
    help_text,
    parse_size,
)
from trainer.config.settings import check_model, read_recipe, resolve
from trainer.errors import RunError
from trainer.plan import cli as plan
from trainer.run_dir import run_directory


def refused(argv, *words):
    with pytest.raises(RunError) as error:
        resolve(argv)
    for word in words:
        assert word in str(error.value)
    assert error.value.code == 2


def test_layers_of_a_key(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "learning_rate: 3e-5\nmax_steps: 7\nmethod: full\nlora:\n  learning_rate: 1e-3\n"
    )
    settings = resolve(["--config", str(recipe), "--max-steps", "9"])
    assert (settings.max_steps, settings.learning_rate) == (9, 3e-5)
    assert (
        settings.sources["max_steps"] == "command line"
        and "r.yaml" in settings.sources["learning_rate"]
    )
    assert resolve(["--config", str(recipe), "--method", "lora"]).learning_rate == 1e-3
    assert resolve([str(recipe)]).max_steps == 7


def test_defaults_without_a_recipe(tmp_path):
    for method, rate in LEARNING_RATE.items():
        settings = resolve(["--model_name_or_path", "x", "--method", method])
        assert settings.learning_rate == rate and settings.gradient_checkpointing is True
        assert settings.training_arguments()["learning_rate"] == rate


def test_the_default_model_takes_its_recipe():
    settings = resolve([])
    assert (
        settings.max_steps == 40
        and settings.gradient_checkpointing is False
        and settings.precision == "fp32"
    )
    assert resolve(["--method", "lora"]).learning_rate == 1e-3


def test_precision_is_said_once(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("precision: fp32")
    settings = resolve([str(recipe), "--bf16"])
    assert (
        settings.precision == "auto" and settings.bf16 is True and not settings.given("precision")
    )
    recipe.write_text("bf16: true")
    settings = resolve([str(recipe), "--precision", "fp32"])
    assert settings.precision == "fp32" and not settings.given("bf16")


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--no_bf16"], "bf16", False),
        (["--max-steps=5"], "max_steps", 5),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", "q_proj,v_proj"),
        (["--local_rank=1"], "local_rank", None),
        (["--activation_checkpointing", "false"], "gradient_checkpointing", False),
        (["--max_steps", "-1"], "max_steps", -1),
    ],
)
def test_spellings(argv, key, value):
    assert resolve(["--model_name_or_path", "x", *argv]).values[key] in (
        value,
        -1 if value is None else value,
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "did you mean --learning_rate"]),
        (["--max_steps", "many"], ["max_steps", "many", "number"]),
        (["--max_steps", "1.5"], ["whole number"]),
        (["--max_steps"], ["needs a value"]),
        (["--bf16", "perhaps"], ["bf16", "true or false"]),
        (["--method", "lorra"], ["method", "did you mean lora"]),
        (["--precision", "fp8"], ["fp8", "bf16, fp16 or fp32"]),
        (["--fp8"], ["fp8"]),
        (["--warmup_ratio", "0.1"], ["--warmup_steps"]),
        (["--fsdp", "full_shard"], ["ZeRO-3"]),
        (["--lora_r", "0"], ["lora_r", "at least 1"]),
        (["stray"], ["stray"]),
        (["--config", "nowhere"], ["no recipe nowhere", "tiny_cpu.yaml"]),
        (["--max_steps", "1", "2"], ["unexpected argument '2'"]),
        (["--fused_step", "false"], ["--disable_optimizations fused_step"]),
        (["--calibrate", "true"], ["--deepspeed auto"]),
        (["--disable_optimizations", "fused_stp"], ["did you mean fused_step", "fetch_ahead"]),
        (["--lr_scheduler_kwargs", "{"], ["lr_scheduler_kwargs", "JSON object"]),
        (["--lr_scheduler_kwargs", "{" * 30 + "}"], ["lr_scheduler_kwargs", "JSON object"]),
        (["--lr_scheduler_kwargs", '{"a":' * 30 + "1" + "}" * 30], ["nested too deeply"]),
        (["--adam_beta1", "1"], ["adam_beta1 is too large"]),
        (["--seed", "-1"], ["seed is too small"]),
        (["--seed", "4294967296"], ["seed is too large", "4294967295"]),
        (["--weight_decay", "nan"], ["weight_decay", "finite"]),
        (["--learning_rate", "inf"], ["learning_rate", "finite"]),
        (["--max_steps", "1e999"], ["max_steps", "finite"]),
        (["--dataloader_num_workers", "-1"], ["dataloader_num_workers is too small"]),
        (["--lora_rank", "8"], ["--lora_rank is --lora_r here"]),
        (["--lora-rank=8"], ["--lora-rank is --lora_r here"]),
        (["--cutoff_len", "8"], ["is --max_length here"]),
        (["--num_gpus", "2"], ["launch/supervise.py --num_gpus N"]),
        (["--local_rnk", "2"], ["unknown flag --local_rnk"]),
        (["--save_strategy", "never"], ["save_strategy", "no | steps | epoch"]),
        (["--optim", "adamw_troch"], ["did you mean adamw_torch"]),
        (["--lr_scheduler_type", "cosin"], ["did you mean cosine"]),
        (["--log_level", "loud"], ["log_level", "warning"]),
        (["--model_name_or_path", "a\ud800"], ["surrogate"]),
        (["--config", "x" * 5000], ["no recipe"]),
    ],
)
def test_refused(argv, words):
    refused(argv, *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", ["r.yaml", "learning_rat", "did you mean learning_rate"]),
        ("- a\n- b", ["mapping"]),
        ("a: [", ["not readable as YAML"]),
        ("max_steps: x", ["r.yaml", "max_steps"]),
        ("lora:\n  lora_rr: 1", ["lora_rr", "did you mean lora_r"]),
        ("3: 1", ["unknown key 3"]),
        ("null: 1", ["unknown key None"]),
        ("yes: 1", ["unknown key True"]),
        ("dataset: {a.jsonl: 0.5}", ["dataset has the wrong type", "a list of texts"]),
        ("dataset: [null]", ["dataset", "None"]),
        ("dataset: [3]", ["dataset", "3"]),
        ("run_name: {a: 1}", ["run_name has the wrong type"]),
        ("deepspeed: [1]", ["deepspeed has the wrong type", "a mapping"]),
        ("max_steps: 1" + 400 * "0", ["max_steps has the wrong type"]),
        ("max_steps: 1" + 5000 * "0", ["not readable as YAML"]),
        ("a: " + 3000 * "[", ["not readable as YAML"]),
        ('run_name: "a\\0"', ["run_name", "NUL"]),
        ('run_name: "\\uD800"', ["run_name", "surrogate"]),
        ('dataset: ["a\\0"]', ["dataset", "NUL"]),
        ('deepspeed: {zero_optimization: {offload_param: {nvme_path: "\\0"}}}', ["NUL"]),
        ("deepspeed: {3: 1}", ["deepspeed", "3"]),
        ("deepspeed: &a {zero_optimization: *a}", ["nested too deeply"]),
        ("lr_scheduler_kwargs: {a: 2020-01-01}", ["lr_scheduler_kwargs", "a number"]),
        ("lr_scheduler_kwargs: " + 30 * "{a: " + 30 * "}", ["nested too deeply"]),
        ("model_name_or_path: yes", ["model_name_or_path", "in quotes"]),
        ("run_name: off", ["run_name", "in quotes"]),
        ("sequence_len: 8", ["sequence_len is max_length here"]),
        ("adapter: lora", ["adapter is method here"]),
        ("full: [1]", ["full is not a mapping"]),
    ],
)
def test_recipe_refused(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    refused(["--config", str(tmp_path / "r.yaml")], *words)


@pytest.mark.parametrize(
    "name", ["tiny_cpu", "llama3_8b_lora", "llama3_8b_full", "llama3_70b_lora", "llama3_70b_full"]
)
def test_shipped_recipes(name):
    path = ROOT / "launch" / "recipes" / f"{name}.yaml"
    read_recipe(path)
    for line in path.read_text().splitlines():
        if line and not line.startswith("#") and ":" in line and line.split(":", 1)[1].strip():
            assert "#" in line or line.split(":")[0].strip() in (
                "method",
                "learning_rate",
                "lr_scheduler_type",
                "num_train_epochs",
                "lora_r",
                "lora_dropout",
                "weight_decay",
                "max_grad_norm",
                "logging_steps",
                "gradient_accumulation_steps",
                "per_device_eval_batch_size",
            ), line


def test_model_directory(tmp_path):
    check_model("org/name")
    for name in (str(tmp_path / "absent"), str(tmp_path), "nothing-here"):
        with pytest.raises(RunError):
            check_model(name)
    (tmp_path / "config.json").write_text("{}")
    check_model(str(tmp_path))


def test_size():
    assert parse_size("4GB", "f") == 4 * 10**9 and parse_size("500 MiB", "f") == 500 * 2**20
    for bad in ("4", "GB", "-1GB", "0GB"):
        with pytest.raises(RunError):
            parse_size(bad, "f")


def test_help_lists_everything():
    text = help_text()
    for name in (
        "learning_rate",
        "lora_target_modules",
        "max_nonfinite_steps",
        "gradient_accumulation_steps",
    ):
        assert f"--{name} " in text
    assert len(all_keys()) > 100


@pytest.mark.parametrize(
    "flags, words", [(["--hub_token", "hf_secret"], "HF_TOKEN"), (["--push_to_hub"], "hf upload")]
)
def test_what_does_not_belong_on_a_command_line(flags, words):
    with pytest.raises(RunError) as error:
        resolve(flags)
    assert (
        error.value.code == 2 and words in str(error.value) and "hf_secret" not in str(error.value)
    )


def test_validation_takes_the_rows_that_training_does():
    recipe = str(ROOT / "launch/recipes/llama3_8b_lora.yaml")
    for argv, rows in (
        (["--per_device_train_batch_size", "3", "--config", recipe], 3),
        ([], 16),  # as tiny_cpu says
    ):
        settings = resolve(argv)
        settings.freeze()
        assert settings.training_arguments()["per_device_eval_batch_size"] == rows


@pytest.mark.parametrize(
    "name",
    [key.name for key in all_keys().values() if key.ours and isinstance(key.default, bool)],
)
def test_a_switch_can_be_off(name):
    for argv, value in (([f"--{name}"], True), ([f"--{name}", "false"], False)):
        assert resolve(["--model_name_or_path", "x", *argv]).values[name] is value


def test_a_prepared_run_changes_no_setting():
    settings = resolve([])
    settings.set("max_steps", 3, "plan")
    assert settings.max_steps == 3 and settings.sources["max_steps"] == "plan"
    settings.freeze()
    with pytest.raises(RuntimeError):
        settings.set("max_steps", 4, "plan")


@pytest.mark.parametrize(
    "value, on_cpu, on_gpu, step",
    [
        ("auto", False, True, True),
        ("none", True, True, True),
        ("all", False, False, False),
        ("leaf_modules", False, False, True),
        ("fused_step,fetch_ahead", False, True, False),
        ("none,fused_step", True, True, False),
    ],
)
def test_optimizations(value, on_cpu, on_gpu, step):
    settings = resolve(["--disable_optimizations", value])
    assert settings.optimizes("leaf_modules", gains=False) == on_cpu
    assert settings.optimizes("leaf_modules", gains=True) == on_gpu
    assert settings.optimizes("fused_step") == step


def test_a_run_lies_on_a_disk():
    with pytest.raises(RunError, match="directory of this machine"):
        run_directory(resolve(["--output_dir", "s3://bucket/run?secret=1"]))
    for name in (".", "..", "a/../../b", "/tmp/run"):
        with pytest.raises(RunError, match="is a name under runs/"):
            run_directory(resolve(["--run_name", name]))


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: off", "eval_strategy", "no"),
        ("save_strategy: No", "save_strategy", "no"),
        ("packing: on", "packing", True),
        ("report_to: no", "report_to", ["none"]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "True"),
        ("max_length:", "max_length", 2048),
        ("method:", "method", "full"),
        ("lora:\n  lora_r:", "lora_r", 16),
    ],
)
def test_what_yaml_makes_of_words(tmp_path, text, key, value):
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: x\n{text}")
    assert resolve([str(tmp_path / "r.yaml")]).values[key] == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_from_any_editor(tmp_path, encoding):
    (tmp_path / "r.yaml").write_text("run_name: größe", encoding=encoding)
    assert resolve([str(tmp_path / "r.yaml")]).run_name == "größe"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x80abc", b"\0"])
def test_a_recipe_that_is_none(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    if content:
        refused(["--config", str(tmp_path / "r.yaml")], "not readable as YAML")
    else:
        assert resolve([str(tmp_path / "r.yaml")]).max_length == 2048


def test_names_of_other_trainers_lead_to_flags_that_exist():
    keys = all_keys()
    assert not {*elsewhere.FLAGS, *elsewhere.ADVICE} & {*keys, *RETIRED, *REFUSED}
    assert {*elsewhere.FLAGS.values()} <= {*keys}


def test_no_flag_is_taken_for_a_longer_one():
    with pytest.raises(RunError, match="--gpu_mem"):
        plan.parse(["--gpu_mem", "80GB"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--optim", "adamw_8bit"], ["bitsandbytes", "pip install bitsandbytes"]),
        (["--optim", "adamw_torch_4bit"], ["torchao"]),
        (["--optim", "schedule_free_adamw"], ["schedulefree"]),
        (["--optim", "galore_adamw"], ["whole matrices"]),
        (["--optim", "adafactor"], ["whole matrices"]),
        (["--report_to", "mlflow"], ["no module mlflow"]),
        ([], ["my.json: tensorboard.enabled", "pip install tensorboard"]),
        (["--report_to", "wandb", "tensorbord"], ["did you mean tensorboard"]),
    ],
)
def test_packages_that_a_value_needs(monkeypatch, flags, words):
    block = {"tensorboard": {"enabled": True}} if not flags else {}
    ds_schema.config()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    all_keys()
    config = DeepSpeedConfig({"zero_optimization": {"stage": 3}, **block}, "my.json")
    with pytest.raises(RunError) as error:
        packages.check(resolve(["--model_name_or_path", "x", *flags]), config)
    assert error.value.code == 2 and all(word in str(error.value) for word in words)


def test_every_optimizer_and_tracker_of_transformers_is_known():
    """What needs a package is named; the rest is torch's."""
    from transformers.integrations import integration_utils

    assert {*packages.TRACKERS, "wandb"} >= {*integration_utils.INTEGRATION_TO_CALLBACK}
    torch_only = {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"}
    patterns = [packages.OF_MATRICES, *packages.OPTIMIZERS]
    for name in all_keys()["optim"].choices:
        known = any(re.fullmatch(pattern, name) for pattern in patterns)
        assert known != (name in torch_only), name


def test_chat_template_kwargs(tmp_path):
    """JSON on the command line, a mapping in a recipe, and nothing else."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("chat_template_kwargs:\n  enable_thinking: false\n", encoding="utf-8")
    typed = ["--chat_template_kwargs", '{"enable_thinking": false}']
    for flags in (typed, ["--config", str(recipe)]):
        assert resolve(flags).chat_template_kwargs == {"enable_thinking": False}
    for wrong in ("enable_thinking=false", "[1]", '{"enable_thinking": }'):
        with pytest.raises(RunError, match="chat_template_kwargs.*\n.*\n.*JSON object"):
            resolve(["--chat_template_kwargs", wrong])
