"""Whether a checkpoint holds the model: every weight, in its shape, and nothing that would be lost.

transformers' own loader runs on the meta device, so renamed, merged and tied weights are its
business, and of the files the headers are read alone. Under ZeRO-3 the same loader says nothing of
weights that the model has no place for.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from trainer.errors import RunError, named
from trainer.plan.model_shapes import stored_tensors

SHOWN = 5  # names of a message
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names them
Stored = dict[str, tuple[str, list[int]]]  # as stored_tensors returns it
LOAD_ERRORS = (OSError, ValueError, ImportError, pickle.UnpicklingError, SafetensorError)


def check(name: str, config: PreTrainedConfig, revision: str, trust_remote_code: bool) -> list[str]:
    """Return lines that say what of the checkpoint is not used: parts beside the language model.

    name: a directory, or a hub name, whose files are fetched. Raise RunError where weights are
    missing or of another shape, where trained weights would be lost, or where it cannot be read.
    ZeRO-3 must not be on yet.
    """
    if find_adapter_config_file(name, revision=revision):
        raise RunError(
            f"{name} holds an adapter beside its weights, which would be loaded into the model",
            found="adapter_config.json",
            fix="merge it first, or take it out of the directory",
        )
    if getattr(config, "quantization_config", None):
        return []  # its loader needs the device; `check_loaded` judges what it says
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, info = _on_meta(name, config, {"": "meta"}, options)
    check_loaded(name, info)
    stored = stored_tensors(_folder(name, revision))
    _check_types(name, model, stored)
    _check_tied(name, model, config, options)
    return _check_unexpected(name, model, info["unexpected_keys"], stored)


def not_loaded(name: str, error: Exception) -> RunError:
    """Return what is said where transformers' loader gives up on a model."""
    return RunError(
        f"the model {name} cannot be loaded",
        found=named(error),
        fix="--random_weights true trains a random model of its shape"
        if "no file named" in str(error)
        else None,
    )


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raise RunError for what `output_loading_info` says of weights that were not loaded."""
    if shapes := info["mismatched_keys"]:
        raise RunError(
            f"the weights of {name} have other shapes than its config.json says",
            found=_named(f"{key}: {list(file)}" for key, file, _ in sorted(shapes)),
            needed=_named(f"{key}: {list(model)}" for key, _, model in sorted(shapes)),
            fix="the config.json that belongs to these weights",
        )
    if missing := info["missing_keys"]:
        raise RunError(
            f"weights are missing in {name}: {len(missing)} of the model would stay random",
            found=f"no {_named(sorted(missing))}",
            needed="every weight of the model that config.json describes",
            fix="all files of the checkpoint, and the config.json that belongs to them; "
            "--random_weights true trains a random model",
        )
    if errors := info.get("error_msgs"):
        raise RunError(f"the weights of {name} cannot be loaded", found=_named(errors))


def _on_meta(
    name: str, config: PreTrainedConfig, devices: dict[str, str], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load the model without memory. Return it, and what transformers says of its weights."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would report as a table is raised below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.bfloat16,
            device_map=devices,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # an index or a pickle that is none fails in many ways
        raise not_loaded(name, error) from None
    finally:
        logging.set_verbosity(level)
    return loaded


def _check_tied(name: str, model: Any, config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Raise RunError where weights that config.json ties are different ones in the checkpoint.

    ZeRO-3 would tie them, and one of the two would be lost.
    """
    tied = dict(model.all_tied_weights_keys)
    # Where the checkpoint has both, transformers leaves it open on the meta device.
    both = {
        target: source
        for target, source in tied.items()
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source)
    }
    if not both:
        return
    modules = {key.rpartition(".")[0] for key in (*both, *both.values())}
    read, _ = _on_meta(name, config, {"": "meta", **dict.fromkeys(modules, "cpu")}, options)
    if apart := sorted(both.keys() - read.all_tied_weights_keys.keys()):
        raise RunError(
            f"config.json of {name} ties weights that are different ones in the checkpoint",
            found=f"{apart[0]} beside {both[apart[0]]}",
            fix="tie_word_embeddings: false in config.json",
        )


def _check_types(name: str, model: Any, stored: Stored) -> None:
    """Raise RunError where a matrix is stored in a type that says little without its scales."""
    own, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for key, (dtype, shape) in sorted(stored.items()):
        names = (key, prefix + key, key.removeprefix(prefix))
        # What transformers renames or joins, such as experts, is known by the end of its name.
        floats = [own[n].is_floating_point() for n in names if n in own] or [key.endswith("weight")]
        if len(shape) > 1 and floats[0] and dtype not in FLOATS:
            raise RunError(
                f"the weights of {name} are quantized, and its config.json does not say how",
                found=f"{key}: {dtype}",
                needed="weights as " + ", ".join(FLOATS),
                fix="the model's own weights in bf16, fp16 or fp32",
            )


def _check_unexpected(name: str, model: Any, keys: Iterable[str], stored: Stored) -> list[str]:
    """Return lines for weights of other parts; raise RunError for weights of the model's parts."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    own = {key.partition(".")[0] for key in model.state_dict()}
    own |= {key.partition(".")[0] for key in model.base_model.state_dict()}
    lost, other = [], {}
    for key in sorted(keys):
        part = key.partition(".")[0]
        plain = key.removeprefix(f"{model.base_model_prefix}.")
        if any(word.startswith(prefixes) for word in key.split(".")):
            lost.append(key)
        elif part not in own:
            other.setdefault(part, []).append(key)
        elif not _is_mask(*stored.get(key, stored.get(plain, ("F32", [2])))):
            lost.append(key)
    if lost:
        raise RunError(
            f"{name} holds weights that its config.json has no place for: {len(lost)} would be "
            "lost",
            found=_named(lost),
            fix="the config.json that belongs to these weights; an adapter is merged first",
        )
    return [f"weights: {part} of {name} is left out ({len(k)})" for part, k in other.items()]


def _is_mask(dtype: str, shape: list[int]) -> bool:
    """Return whether a tensor is a constant that old versions saved: a mask, or its value."""
    square = len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]
    return not dtype.startswith(("F", "BF")) or not shape or square


def _folder(name: str, revision: str) -> Path:
    """Return the directory of a model, on the disk or in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(name, "config.json", revision=revision))).parent


def _named(names: Iterable[str]) -> str:
    """Return the first few names, and how many there are beside."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
