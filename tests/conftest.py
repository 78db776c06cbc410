"""Shared: a tiny random Llama that really trains, its tokenizer, and the command as a user types it."""
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["ZERO_OFFLOAD_CACHE"] = tempfile.mkdtemp(prefix="zero-offload-test-")  # tests neither read nor fill the user's cache
atexit.register(shutil.rmtree, os.environ["ZERO_OFFLOAD_CACHE"], ignore_errors=True)

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(folder):
    """A byte-level BPE of 512 entries, trained on the bundled samples, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = (ROOT / "data" / "samples" / "validation.jsonl").read_text().splitlines()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=512, special_tokens=specials, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                        unk_token="<|endoftext|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, **changes):
    """Save a tiny random Llama: its MLP matrices are 1 MiB in fp32, so they really go to NVMe."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model(folder)
    make_tokenizer(folder)
    return folder


def write_rows(path, rows):
    """Write objects as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """60 instruction rows of different lengths, and 11 for validation: (train file, validation file)."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.loads(line) for line in (ROOT / "data" / "samples" / "train.jsonl").read_text().splitlines()[:71]]
    return write_rows(folder / "train.jsonl", lines[:60]), write_rows(folder / "validation.jsonl", lines[60:])


def samples(tokenizer, path, max_length=96, **options):
    """(Samples, Summary) of one file, all rows in file order. Encoder options: last_turn_only; others go to `cut`."""
    import numpy as np

    from data import dataset, source, tokenize

    encoder = tokenize.Encoder(tokenizer, options.pop("last_turn_only", False))
    (one,) = source.resolve([str(path)])
    file = tokenize.tokenized(one, encoder)
    return dataset.cut([file], [(0, np.arange(len(file)))], max_length, **options)


class Run:
    """What one training command left behind."""

    def __init__(self, code, output, directory):
        self.code, self.output, self.directory = code, output, directory

    @property
    def records(self):
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self):
        return [r for r in self.records if "loss" in r]

    @property
    def losses(self):
        return [r["loss"] for r in self.steps]

    @property
    def evaluations(self):
        return [r for r in self.records if "eval_loss" in r]


def train(directory, *flags, ranks=1, launcher=True, env=None, timeout=600, script="launch/train.py", **popen):
    """`deepspeed launch/train.py …` from the repository root; the run directory is `directory`."""
    binary = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port",
              str(29600 + os.getpid() % 300)] if launcher else [sys.executable]
    command = [*binary, script, "--output_dir", str(directory), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=timeout, **popen)
    return Run(done.returncode, done.stdout, Path(directory))


@pytest.fixture
def trains(tiny_model, rows_file, tmp_path):
    """trains(name, *flags) → Run of the tiny model in fp32 that must have succeeded."""
    def go(name, *flags, code=0, **options):
        run = train(tmp_path / name, "--model_name_or_path", tiny_model, "--dataset", rows_file[0], "--validation_split",
                    rows_file[1], "--precision", "fp32", "--max_length", 96, "--learning_rate", 1e-3,
                    "--nvme_path", tmp_path / "swap", *flags, **options)
        assert run.code == code, run.output[-6000:]
        return run
    return go
