"""Exports: names, shapes and files as transformers writes them, and what can fail at the end.

The models are tiny and of random weights; `PreTrainedModel.save_pretrained` is the reference.
"""

import gc
import json
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from tests.families.configs import FAMILIES, config_of
from trainer.errors import BAD_INPUT, RunError
from trainer.export import merge as merging
from trainer.export import writer

STACKED = {  # families whose experts are one tensor in transformers, and many on the hub
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3", "glm4_moe", "olmoe"),
    *("phimoe", "ernie4_5_moe", "deepseek_v2"),
}
LIMIT = 20_000  # bytes of a file: each model has several


def make(kind, **changes):
    """A tiny model of a family with random weights."""
    config = config_of(kind, small=True, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def exported(model, folder, **options):
    """Write the model into a new folder and return it."""
    folder.mkdir()
    plan = writer.layout(model, options.pop("limit", LIMIT))
    writer.write_model(model, folder, plan, **options)
    return folder


def weights(folder):
    """{name: tensor} of all files."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(ours, theirs):
    """Same names, shapes, types and values."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


# MPT's and GPT's own configurations have no cache, and an export is of a model with one.
@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"mpt", "openai-gpt"}))
def test_an_export_is_what_transformers_saves(kind, tmp_path):
    """Of a model that was made, and of one that was read: names, tensors, configuration, logits."""
    model = make(kind)
    ids = torch.arange(3, 15)[None]
    for stage in ("made", "read"):
        theirs, ours = tmp_path / f"{stage}-theirs", exported(model, tmp_path / stage)
        model.save_pretrained(theirs)
        assert_equal(weights(ours), weights(theirs))
        for name in ("config.json", "generation_config.json"):
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
        index = json.loads((ours / "model.safetensors.index.json").read_text())
        tensors = weights(ours)
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for path in ours.glob("*.safetensors"):
            inside = load_file(path)
            assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= LIMIT
        again, found = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
        assert not any(found.values()), found
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again.eval()(ids).logits)
        model = again
    experts = [name for name in tensors if ".experts.3." in name]
    assert bool(experts) == (kind in STACKED)


def test_files_are_filled(tmp_path):
    """An expert counts as itself, not as the stack that it is a part of."""
    ours = exported(make("qwen3_moe"), tmp_path / "ours")
    sizes = [sum(t.nbytes for t in load_file(p).values()) for p in ours.glob("*.safetensors")]
    assert len(sizes) <= 2 * sum(sizes) / LIMIT


def test_one_tensor_is_gathered_at_a_time(tmp_path):
    """In memory are one file and one stack of experts. A rank that writes nothing gathers too."""
    model, calls = make("qwen3_moe"), {True: [], False: []}

    def gathering(calls):
        @contextmanager
        def gather(tensors):
            calls.append([id(tensor) for tensor in tensors])
            yield

        return gather

    exported(model, tmp_path / "ours", gather=gathering(calls[True]))
    writer.write_model(model, None, writer.layout(model, LIMIT), gathering(calls[False]))
    assert calls[True] == calls[False] and all(len(call) == 1 for call in calls[True])
    assert sorted(call[0] for call in calls[True]) == sorted(id(p) for p in model.parameters())


def test_an_export_is_broken_off_between_files(tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(writer.BrokenOff):
        exported(make("llama"), tmp_path / "ours", breaks_off=lambda: next(asked))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == 2


def test_what_becomes_one_tensor_is_converted_together(tmp_path):
    """A hub that has query, key and value in one matrix; both are checked against the reference."""
    model = make("llama", num_key_value_heads=4)
    parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv.weight", parts, [Chunk(0)])]
    model._weight_conversions[0]._was_used = True
    groups = [names for names, _ in writer.layout(model, LIMIT).groups if len(names) > 1]
    assert [[n.split(".")[-2][0] for n in names] for names in groups] == [["k", "q", "v"]] * 2 or [
        [n.split(".")[-2][0] for n in names] for names in groups
    ] == [["q", "k", "v"]] * 2
    model.save_pretrained(tmp_path / "theirs")
    ours = weights(exported(model, tmp_path / "ours"))
    assert_equal(ours, weights(tmp_path / "theirs"))
    assert "model.layers.1.self_attn.qkv.weight" in ours


def test_a_conversion_that_the_checkpoint_did_not_need_is_not_reverted(tmp_path):
    """Under ZeRO-3 transformers keeps all that it knows, old names of other models among them."""
    model = make("llama")
    model._weight_conversions = [WeightRenaming("ancient_norm", "norm")]
    assert "model.norm.weight" in weights(exported(model, tmp_path / "ours"))


def test_tied_embeddings_come_once(tmp_path):
    model = make("llama", tie_word_embeddings=True)
    ours = exported(model, tmp_path / "ours")
    assert "lm_head.weight" not in weights(ours)
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] is True


CONTRADICTIONS = {
    "sampling": (
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"temperature", "top_p", "top_k"},
    ),
    "beams": (
        {"length_penalty": 2.0, "early_stopping": True},
        {"length_penalty", "early_stopping"},
    ),
    "outputs": ({"output_scores": True}, {"output_scores"}),
    "several": ({"num_return_sequences": 4, "max_new_tokens": 7}, {"num_return_sequences"}),
    "pad": ({"pad_token_id": -1, "do_sample": True, "top_p": 0.9}, {"pad_token_id"}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_generation_config_always_saves(name, tmp_path, capsys):
    """What contradicts other fields is dropped and named; the rest stays."""
    fields, dropped = CONTRADICTIONS[name]
    model = make("llama")
    for key, value in {**fields, "eos_token_id": [2, 5]}.items():
        setattr(model.generation_config, key, value)
    written = json.loads(
        (exported(model, tmp_path / "ours") / "generation_config.json").read_text()
    )
    kept = {**fields, "eos_token_id": [2, 5]}
    assert not dropped & written.keys()
    assert all(written[key] == value for key, value in kept.items() if key not in dropped)
    notes = [line for line in capsys.readouterr().out.splitlines() if "generation_config" in line]
    assert len(notes) == 1 and all(key in notes[0] for key in dropped)
    GenerationConfig.from_pretrained(tmp_path / "ours").validate(strict=True)


def test_generation_fields_in_the_configuration(tmp_path):
    """Older models have them in config.json, where transformers 5 refuses to save them."""
    make("llama").save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    content |= {"do_sample": True, "temperature": 0.7}
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    ours = exported(AutoModelForCausalLM.from_pretrained(tmp_path / "old"), tmp_path / "ours")
    assert "temperature" not in json.loads((ours / "config.json").read_text())
    assert json.loads((ours / "generation_config.json").read_text())["temperature"] == 0.7


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch):
    """The code goes with the weights, and the copy is loaded without the original."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(tmp_path / "hf")
    base = tmp_path / "base"
    make("llama").save_pretrained(base)
    (base / "own_code.py").write_text(CODE)
    content = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    content |= {"auto_map": names, "model_type": "own_llama"}
    (base / "config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    ours = exported(model, tmp_path / "ours")
    shutil.rmtree(base)
    assert (ours / "own_code.py").read_text() == CODE
    assert json.loads((ours / "config.json").read_text())["auto_map"] == names
    again = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True)
    assert_equal(again.state_dict(), model.state_dict())


def test_files_of_a_model_that_reads_more_than_text(tmp_path):
    config = AutoConfig.for_model("gemma3")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert [p.name for p in writer.processor_files(str(tmp_path), None, config)] == [
        "preprocessor_config.json"
    ]
    assert not writer.processor_files(str(tmp_path), None, config.get_text_config())


def on_meta(kind="llama", **changes):
    """A model without memory, as a run has it before its model is loaded."""
    with torch.device("meta"):
        return make(kind, **changes)


def refused(model, tokenizer, tmp_path):
    """The error before the run."""
    with pytest.raises(RunError) as caught:
        writer.rehearse(model, tokenizer, str(tmp_path), None)
    assert caught.value.code == BAD_INPUT and "could not be exported" in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_found_before_the_run(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    writer.rehearse(on_meta(), tokenizer, str(tiny_model), None)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + "\ud83d"  # half a character: JSON can hold it, UTF-8 not
    assert "surrogates" in refused(on_meta(), tokenizer, tmp_path)
    tokenizer.chat_template = template
    tokenizer.init_kwargs["own"] = {1, 2}
    assert "JSON" in refused(on_meta(), tokenizer, tmp_path)
    del tokenizer.init_kwargs["own"]
    model = on_meta()
    model.config.own = {1, 2}
    assert "JSON" in refused(model, tokenizer, tmp_path)
    model = on_meta("mixtral")
    model._weight_conversions = [WeightConverter("a.weight", ["gate.weight"], [Broken()])]
    model._weight_conversions[0]._was_used = True
    assert "no way back" in refused(model, tokenizer, tmp_path)


class Broken(Chunk):
    """A conversion that transformers cannot revert."""

    @property
    def reverse_op(self):
        raise NotImplementedError("no way back")


def test_a_full_disk_for_temporary_files_is_no_refusal(tiny_model, monkeypatch):
    class Full:
        def save_pretrained(self, folder):
            raise RuntimeError("No space left on device (os error 28)")  # as tokenizers has it

    writer.rehearse(on_meta(), Full(), str(tiny_model), None)
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    writer.rehearse(on_meta(), AutoTokenizer.from_pretrained(tiny_model), str(tiny_model), None)


# -- merged models -----------------------------------------------------------------------------
@pytest.fixture
def adapter(tiny_model, tmp_path):
    """adapter(kind, configuration) → folder of a PEFT adapter whose base is under tmp_path."""
    from peft import get_peft_model

    def go(kind, config, **changes):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        model = make(kind, vocab_size=512, **changes)
        model.save_pretrained(base)
        contradicting = {"temperature": 0.6, "eos_token_id": 2}
        (base / "generation_config.json").write_text(json.dumps(contradicting))
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text("---\nbase_model: x\nlibrary_name: peft\n---\n")
        return folder

    return go


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("kind, more", [("llama", {}), ("qwen3_moe", {}), ("qwen3_moe", EXPERTS)])
def test_a_merged_model_is_written_as_an_export(kind, more, adapter, tmp_path):
    """Names of the hub, files of at most the limit, readable, and base + adapter in its logits."""
    from peft import AutoPeftModelForCausalLM, LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], **more)
    folder, output = adapter(kind, config), tmp_path / "merged"
    merging.merge(folder, output, 100_000)
    assert weights(output).keys() == weights(tmp_path / "base").keys()
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    assert len(sizes) > 1 and all(size < 110_000 for size in sizes)
    assert {stat.S_IMODE(p.stat().st_mode) for p in output.iterdir()} == {0o666 & ~umask()}
    assert "library_name: transformers" in (output / "README.md").read_text()
    again, found = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(found.values()), found
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(ids).logits
        logits = again.eval()(ids).logits
    assert torch.allclose(logits, expected, atol=1e-4) and not torch.allclose(
        plain, logits, atol=1e-3
    )


ADAPTED = ["q_proj", "o_proj"]


def drop(folder, part):
    """Take the tensors with this part in their names out of an adapter's file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: drop(folder, "lora_B"), "missing, such as"),
        (lambda folder: drop(folder, "lm_head"), "cannot be put on its base"),
        (lambda folder: configure(folder, target_modules=["q_proj"]), "without a place, such as"),
        (lambda folder: configure(folder, target_modules=[*ADAPTED, "k_proj"]), "missing, such as"),
        (lambda folder: configure(folder, r=4), "cannot be put on its base"),
    ],
    ids=["half", "module", "fewer targets", "more targets", "rank"],
)
def test_an_adapter_that_does_not_match_itself(change, said, adapter, tmp_path):
    """Tensors that are missing in its file, or that its configuration has no place for."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=ADAPTED, modules_to_save=["lm_head"])
    folder = adapter("llama", config)
    change(folder)
    with pytest.raises(RunError, match=said) as error:
        merging.merge(folder, tmp_path / "merged", LIMIT)
    assert error.value.code == BAD_INPUT and not (tmp_path / "merged").exists()


def umask():
    """The umask of this process."""
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_adapter_that_is_no_part_of_the_weights(adapter, tmp_path):
    from peft import PromptTuningConfig

    folder = adapter("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(RunError, match="cannot be merged"):
        merging.merge(folder, tmp_path / "merged", LIMIT)
    assert not (tmp_path / "merged").exists()


def test_a_merge_has_one_weight_in_memory_at_a_time(adapter, tmp_path):
    """Not the model, of 117 MB here: what the process has for itself while it merges."""
    from threading import Event, Thread

    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    folder = adapter("llama", config, **shape)
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))

    def own():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    merging.merge(folder, tmp_path / "first", 10**9)  # what it imports
    gc.collect()
    before, peak, done = own(), [0], Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], own())

    thread = Thread(target=watch)
    thread.start()
    try:
        merging.merge(folder, tmp_path / "second", 10**9)
    finally:
        done.set()
        thread.join()
    assert size > 100e6 and 0 < peak[0] - before < size / 2, (size, peak[0] - before)


@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "none"},
    ],
    ids=["modules_to_save", "dora", "embeddings", "bias"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_merge_is_what_peft_merges(more, tied, adapter, tmp_path):
    from peft import LoraConfig, PeftModel

    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ADAPTED, **more})
    folder = adapter("qwen2", config, tie_word_embeddings=tied)
    merging.merge(folder, tmp_path / "merged", LIMIT)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_equal(weights(tmp_path / "merged"), weights(tmp_path / "theirs"))


@pytest.mark.parametrize("configured, fits", [("float32", True), ("bfloat16", False)])
def test_a_base_that_is_read_into_another_type_has_to_fit(configured, fits, tmp_path, monkeypatch):
    save_file({f"w{i}": torch.zeros(1000) for i in range(100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": configured}))
    (tmp_path / "other.safetensors").write_bytes(b"broken")
    monkeypatch.setattr(merging, "free_memory", lambda: 100_000)
    if fits:
        merging._check_base(str(tmp_path), tmp_path, whole=False)
    else:
        with pytest.raises(RunError, match="does not fit"):
            merging._check_base(str(tmp_path), tmp_path, whole=False)
