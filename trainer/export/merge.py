"""Merge a run's LoRA adapter into its base model: a plain model directory."""

import contextlib
import functools
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data.files import STORED_DTYPES, new_directory, read_json
from trainer.checkpoint.base import fingerprint
from trainer.config.command_line import Parser, command
from trainer.config.flags import all_keys, parse_size
from trainer.config.settings import RESOLVED
from trainer.console import say
from trainer.errors import DOES_NOT_FIT, DONE, FAILED, RunError, one_line
from trainer.export import BASE, not_written
from trainer.system.hardware import free_memory


def merge(run: Path, output: Path, limit: int) -> None:
    """Merge a run's adapter into its base model and write a new model directory.

    The base model's files are mapped, and one weight after the other gets its adapter and is
    written. run: a run directory, or a directory that holds an adapter. limit: bytes of one file.
    Raises RunError where that cannot be done.
    """
    adapter = run / "export" if (run / "export").is_dir() else run
    if not (adapter / "adapter_config.json").is_file():
        whole = (adapter / "config.json").is_file()
        raise RunError(
            f"{adapter} holds no LoRA adapter",
            needed="adapter_config.json; a run with --method lora that has ended",
            fix="a full fine-tune's export/ is a whole model already" if whole else None,
        )
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from trainer.export.writer import layout, processor_files, write_model
    from trainer.modeling import weights

    base, whole = _base_of(adapter)
    _check_base(base, adapter, whole)
    if output.exists():
        raise RunError(f"{output} exists", fix="choose another --output, or remove it")
    say(f"loading {base}")
    resolved = run / RESOLVED
    settings = yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.is_file() else {}
    revision, trusted = settings.get("model_revision"), settings.get("trust_remote_code", False)
    revision = revision or "main"
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trusted)
        for line in weights.check(base, config, revision, trusted):
            say(line)
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", revision=revision, trust_remote_code=trusted
        )
        _check_same_base(base, revision, trusted, adapter)
        plan = layout(model, limit)
        adapted = _adapted(model, adapter)
        if whole:
            model = adapted.merge_and_unload()
            plan = layout(model, limit)
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trusted)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{base} with the adapter in {adapter} cannot be read", found=one_line(error)
        ) from None
    others = processor_files(base, revision, model.config)
    try:
        with new_directory(output) as work:
            merged = functools.partial(_merged, _owners(model), plan.tensors, base)
            write_model(model, work, plan, merged)
            for file in others:
                shutil.copy(file, work)
            tokenizer.save_pretrained(work)
            _write_card(adapter, work)
    except OSError as error:
        raise not_written(output, error) from None
    say(f"merged model: {output}")


def _base_of(adapter: Path) -> tuple[str, bool]:
    """Return the adapter's base model, and whether more than the weights of layers changes.

    Where modules have been replaced, tied ones are not tied any more. Raises RunError where the two
    do not become one model.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"the adapter in {adapter} cannot be read", found=one_line(error)) from None
    if config.is_prompt_learning:
        raise RunError(
            f"the adapter in {adapter} cannot be merged",
            found=f"{config.peft_type}: vectors before the prompt",
            needed="an adapter of the weights, such as LoRA",
        )
    whole = ("modules_to_save", "trainable_token_indices")
    return str(config.base_model_name_or_path), any(getattr(config, name, None) for name in whole)


def _adapted(model: Any, adapter: Path) -> Any:
    """Return the base model with the adapter on it, as a PEFT model.

    Raises RunError where the adapter's tensors are not those that its configuration describes.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # it is refused below
            adapted: Any = PeftModel.from_pretrained(model, adapter)
        # Once more: only this one returns which names of the file and of the model did not match.
        renamed = getattr(model, "_checkpoint_conversion_mapping", None)  # as the first call does
        name = adapted.active_adapter
        loaded = adapted.load_adapter(str(adapter), name, key_mapping=renamed)
    except Exception as error:  # a dozen kinds: other shapes, a tensor of a whole module is missing
        raise RunError(
            f"the adapter in {adapter} cannot be put on its base model", found=one_line(error)
        ) from None
    names = {"missing": loaded.missing_keys, "without a place": loaded.unexpected_keys}
    found = [f"{len(n)} {what}, such as {min(n)}" for what, n in names.items() if n]
    if found:
        raise RunError(
            f"the adapter in {adapter} does not match its adapter_config.json",
            found=f"tensors: {'; '.join(found)}",
            needed="all tensors that adapter_config.json describes, and no others",
            fix="adapter_config.json and adapter_model.safetensors of one export, as it wrote them",
        )
    return adapted


def _write_card(adapter: Path, work: Path) -> None:
    """Write the adapter's model card as the model's: it is loaded with transformers now."""
    if (adapter / "README.md").is_file():
        card = (adapter / "README.md").read_text(encoding="utf-8", errors="replace")
        card = card.replace("library_name: peft\n", "library_name: transformers\n", 1)
        (work / "README.md").write_text(card, encoding="utf-8")


def _check_same_base(base: str, revision: str, trusted: bool, adapter: Path) -> None:
    """Raise RunError where the base model is not the one that the adapter was trained on.

    An adapter that is not of this trainer does not say which that is.
    """
    if not (adapter / BASE).is_file():
        return
    needed = read_json(adapter / BASE).get("fingerprint")
    found = fingerprint(base, revision, trusted)
    if needed not in (found, "random"):
        raise RunError(
            f"the adapter in {adapter} belongs to another base model",
            found=f"{base} with fingerprint {found}",
            needed=f"the weights with fingerprint {needed}",
            fix="put them back, or set base_model_name_or_path in "
            f"{adapter / 'adapter_config.json'}",
        )


def _owners(model: Any) -> dict[int, list[tuple[Any, list[Any]]]]:
    """Return {id of a base parameter: the adapted layers that change it, with all they change}.

    PEFT puts those layers into the base model itself; once it is merged it has none.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, list[tuple[Any, list[Any]]]] = {}
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, ParamWrapper):
            changed = [layer.get_param()]
        else:
            changed = list(layer.get_base_layer().parameters(recurse=False))
        for param in changed:
            owners.setdefault(id(param), []).append((layer, changed))
    return owners


@contextlib.contextmanager
def _merged(
    owners: dict[int, list], names: dict[str, Any], base: str, tensors: list[Any]
) -> Iterator[None]:
    """Let these base weights have their adapters for as long as the context lives.

    owners: see _owners. names: {name: weight} of all of them. Raises RunError for a sum that is not
    finite: fp16 may not hold it.
    """
    from trainer.engine.values import is_finite

    layers = {
        id(layer): (layer, changed) for t in tensors for layer, changed in owners.get(id(t), ())
    }
    before = {id(p): (p, p.data) for _, changed in layers.values() for p in changed}
    for param, data in before.values():
        param.data = data.clone()  # it is mapped from the file
    try:
        for layer, _ in layers.values():
            try:
                layer.merge()
            except Exception as error:  # each kind of adapter has its own
                raise RunError("the adapter cannot be merged", found=one_line(error)) from None
        for tensor in tensors:
            if tensor.is_floating_point() and not is_finite(tensor.detach()):
                name = next(name for name, weight in names.items() if weight is tensor)
                raise RunError(
                    f"the merged weights are not finite: {name}",
                    found=f"{base} is in {str(tensor.dtype).removeprefix('torch.')}",
                    needed="a base model and an adapter whose sum is finite; nothing was written",
                    code=FAILED,
                )
        yield
    finally:
        for layer, _ in layers.values():
            layer.merged_adapters.clear()
        for param, data in before.values():
            param.data = data


def _check_base(base: str, adapter: Path, whole: bool) -> None:
    """Raise RunError where the base model is gone or does not fit in RAM; a hub name passes.

    whole: all of it will be in RAM. Else it is a weight three times: of the file's pages none has
    to stay. What is read into another type, and experts, which are joined to stacks, are all there.
    """
    import torch

    from trainer.plan.model_shapes import stored_tensors

    if Path(base).is_dir():
        config: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # it is named when the model is loaded
            config = read_json(Path(base, "config.json"))
        made = STORED_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        bytes_of = {stored: getattr(torch, name).itemsize for name, stored in STORED_DTYPES.items()}
        sizes: list[tuple[int, bool]] = []
        for name, (dtype, shape) in stored_tensors(Path(base)).items():
            other = made not in (None, dtype)
            size = math.prod(shape) * bytes_of.get(dtype, 1)
            sizes.append((size, whole or other or ".experts." in name))
        stay = sum(size for size, stays in sizes if stays)
        needed = 1.2 * stay + 3 * max((size for size, _ in sizes), default=0)
        free = free_memory()
        if needed > free:
            raise RunError(
                "what has to be in RAM to merge the model does not fit",
                found=f"{free / 1e9:.1f} GB free",
                needed=f"{needed / 1e9:.1f} GB",
                code=DOES_NOT_FIT,
            )
    elif base.startswith("/"):
        raise RunError(
            f"the adapter's base model is gone: {base}",
            fix=f"put it back, or set base_model_name_or_path in {adapter / 'adapter_config.json'}",
        )


@command
def main(argv: list[str] | None = None) -> int:
    """Return the exit code of `launch/export.py`."""
    parser = Parser(
        prog="launch/export.py", description="Merge a run's LoRA adapter into its base model."
    )
    parser.add_argument(
        "--merge",
        metavar="RUN",
        required=True,
        type=Path,
        help="run directory, or a directory that holds an adapter",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where to write the model (default RUN/export-merged)",
    )
    key = all_keys()["max_shard_size"]
    parser.add_argument(
        "--max_shard_size", default=key.default, help=f"{key.help} (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    limit = parse_size(args.max_shard_size, "max_shard_size")
    merge(args.merge, args.output or args.merge / "export-merged", limit)
    return DONE
