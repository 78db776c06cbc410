"""What tests and benchmarks share: a tokenizer for models with random weights, and flags."""

import json

# The configuration of a tiny model, of whatever family.
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def flags(**values):
    """["--name", value, …] of the keyword arguments."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def swap_flags(folder):
    """Return the flag for swap files in `folder`, where its file system needs one."""
    from data.storage import filesystem_of
    from trainer.system.swap_dir import RESERVING

    return [] if filesystem_of(folder) in RESERVING else ["--allow_any_swap_filesystem"]


def make_tokenizer(folder, text):
    """Train a byte-level BPE of 512 entries on `text` (lines), and save it in `folder`.

    It has a ChatML template. `folder` holds a model's configuration.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


# Shares of a rank's trained elements: weights, gradients and states on the GPU, states in RAM.
SPLITS = [
    (1, 1, 1, 0),  # all on the GPU
    (0, 0, 0, 0),  # states on NVMe
    (1, 1, 0, 1),  # weights and gradients on the GPU, states in RAM
    (1, 1, 0, 0),  # and on NVMe
    (0.8, 0.5, 0.3, 0.4),  # a bit of everything
    (0.5, 0.8, 0.3, 0.4),
    (0, 1, 0, 0.5),
    (1, 0, 0, 0.5),
]


def tiers_flags(folder, shares, trained):
    """Return the flags of ds_z3_infinity.json with these places. trained: elements of one rank."""
    import hjson

    from trainer.config.ds_config import CONFIGS, Tiers

    config = hjson.loads((CONFIGS / "ds_z3_infinity.json").read_text())
    for place, share in zip(Tiers._fields, shares, strict=True):
        config["tiers"][place] = int(share * trained)
    path = folder / f"{'-'.join(map(str, shares))}.json"
    path.write_text(json.dumps(config))
    return ["--deepspeed", path]
