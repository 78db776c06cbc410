"""One run from flags to exported model: what `launch/train.py` calls."""

import json
import os
import resource
import sys
import traceback
import warnings
from importlib import metadata
from pathlib import Path

from data import DataError, storage
from trainer import ROOT, __version__, data_setup
from trainer.checkpoint import resume
from trainer.config.ds_config import (
    check_agreement,
    check_buffers,
    check_config,
    find_config,
    locked_bytes,
    read_config,
    resolve_auto,
    uses_nvme,
    write_yaml,
)
from trainer.config.flags import RESOLVED, all_keys, check_model, help_text, parse_size, resolve
from trainer.doctor import checks
from trainer.engine import patches
from trainer.errors import (
    BAD_INPUT,
    CRASHED,
    DONE,
    FAILED,
    STOPPED,
    RunError,
    is_main_process,
    report,
    say,
    table,
)
from trainer.plan import auto
from trainer.run_dir import default_run_name, run_directory
from trainer.system import default_model, hardware, ops, swap_dir

SECRET = ("hub_token",)
VERSIONED = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "wandb",
)


def main(argv=None):
    """Exit code of the run. Bad input ends before torch is imported, where it can be seen without."""
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in argv):
        print(help_text())
        return DONE
    started = False
    begun = []  # the run directory, once there is one
    try:
        settings = resolve(argv)
        prepared = prepare(settings)
        started = True
        return train(settings, *prepared, begun)
    except (RunError, DataError) as error:
        # What is decided from flags and files is the same on every rank; what came later may be known to one rank only.
        report(error, everywhere=started)
        code = error.code if isinstance(error, RunError) else BAD_INPUT
        if code == FAILED:
            _say_how_to_go_on(begun)
        return code
    except KeyboardInterrupt:
        say("\nstopped before the first update")
        return STOPPED
    except Exception:
        traceback.print_exc()
        _say_how_to_go_on(begun)
        # A supervisor tries again what nobody foresaw, and not what was refused.
        return CRASHED if os.environ.get("ZERO_OFFLOAD_SUPERVISED") else FAILED


def _say_how_to_go_on(begun):
    """The last checkpoint of a run that failed, and the line that resumes it."""
    if begun and is_main_process() and (last := resume.newest(begun[0])) is not None:
        print(
            f"the last checkpoint is of step {last}; to go on from it: {resume.command(begun[0])}",
            file=sys.stderr,
            flush=True,
        )


def leave(code):
    """End the process with this code. The interpreter's own end stops the threads of gloo and libaio in any order, which at times
    aborts and turns the code, which is a promise, into another."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(settings):
    """All that can be refused without torch: (DeepSpeed configuration, its path, data, precision, on a GPU, reason)."""
    calibrate = auto.choose(settings) if settings.deepspeed == auto.AUTO else None
    given = settings.deepspeed
    path, config = ("--deepspeed", given) if isinstance(given, dict) else (find_config(given), None)
    config = check_config(read_config(path) if config is None else config, path)
    check_agreement(config, settings, path)
    gpu = hardware.uses_gpu(settings)
    precision, reason = hardware.choose_precision(settings, config, gpu, path)
    offload = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    if (
        settings.save_strategy != "no"
        and settings.given("optim")
        and settings.optim not in ("adamw_torch", "adamw_torch_fused")
    ):
        raise RunError(
            "this optimizer's state cannot be saved",
            found=f"--optim {settings.optim}",
            needed="adamw_torch or adamw_torch_fused, or --save_strategy no",
        )
    if (
        offload != "none"
        and settings.given("optim")
        and not str(settings.optim).startswith("adamw")
    ):
        raise RunError(
            "an offloaded optimizer is DeepSpeed's CPU Adam",
            found=f"--optim {settings.optim}",
            fix="leave --optim out, or use --deepspeed ds_z3.json",
        )
    parse_size(settings.max_shard_size, "max_shard_size")
    if settings.model_name_or_path is not None:
        check_model(settings.model_name_or_path)
    elif settings.random_weights:
        raise RunError(
            "--random_weights needs a shape", needed="--model_name_or_path with a config.json"
        )
    check_resume(settings)
    if uses_nvme(config):
        swap_dir.check_directory(settings.nvme_path)
    checks.quick(gpu, uses_nvme(config))
    data = data_setup.plan(settings, data_setup.progress("looking at rows"))
    if calibrate:
        calibrate()
    return config, path, data, precision, gpu, reason


def check_resume(settings):
    """Refuse a run directory that is not new, and a resumption that names no run."""
    asked = settings.resume_from_checkpoint
    if asked in (True, "True", "true"):
        asked = "auto"
    elif asked in (False, "False", "false"):
        asked = None
    settings.values["resume_from_checkpoint"] = asked
    directory = run_directory(settings)
    if asked and asked != "auto":
        if not Path(asked).is_dir():
            raise RunError(
                f"no checkpoint {asked}", needed="a checkpoint-<step> directory of a run, or auto"
            )
        if directory is None:
            settings.values["output_dir"] = str(Path(asked).absolute().parent)
    elif asked and directory is None:
        raise RunError(
            "--resume_from_checkpoint auto needs to know the run",
            fix="--run_name NAME (RUN= with make), or --output_dir",
        )
    elif not asked and directory is not None and (directory / "metrics.jsonl").exists():
        raise RunError(
            f"the run directory {directory} holds a run already",
            fix="another --run_name (RUN= with make); or to go on "
            f"with it: {resume.command(directory)}",
        )


def _start_processes(gpu, config, fetch_ahead=False):
    """Join the ranks, and return how many are on this machine. Before TrainingArguments, or DeepSpeed would take the number of CPU
    ranks for 1."""
    import socket

    import torch

    if os.environ.get("WORLD_SIZE", "1") == "1":
        # Alone, no other process has to know the port: a free one, so that a second run on the machine does not fail on it.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1"
        )
        os.environ["MASTER_PORT"] = str(port)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "OMP_NUM_THREADS" not in os.environ:
        # Without this every rank's CPU Adam takes all cores at once.
        threads = max(1, len(os.sched_getaffinity(0)) // ranks_here)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if gpu:
        hardware.set_allocators(torch)
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RunError(
                "more ranks than GPUs",
                found=f"rank {local} of this machine, {torch.cuda.device_count()} GPU(s)",
                fix="deepspeed --num_gpus N, or GPUS=N with make",
            )
        torch.cuda.set_device(local)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ops.use_own_ninja()
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if os.environ["LOCAL_RANK"] == "0":  # the other ranks wait for it where they join
        ops.ensure(ops.needed(config, ranks_here, gpu))
    patches.apply(fetch_ahead)
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)
    if not gpu:
        # DeepSpeed never removes the 66 MiB that each CPU rank shares. Once all have mapped them, the names are not needed.
        torch.distributed.barrier()
        name = "_".join(
            map(
                str,
                (
                    "deepspeed_allreduce_buffer",
                    os.getuid(),
                    os.environ["MASTER_ADDR"],
                    os.environ["MASTER_PORT"],
                    torch.distributed.get_rank(),
                ),
            )
        )
        Path("/dev/shm", name).unlink(missing_ok=True)
    return ranks_here


def _together(*steps):
    """Run each step on this rank; where one fails on any rank, raise that on all of them."""
    from trainer.checkpoint.checkpoints import gathered

    failure = None
    try:
        for step in steps:
            step()
    except RunError as error:
        failure = error
    first = next((f for f in gathered(failure and (str(failure), failure.code)) if f), None)
    if first:
        raise failure or RunError(first[0], code=first[1])


def train(settings, config, config_path, data, precision, gpu, reason, begun):
    """Train, evaluate, export. Returns the exit code; puts the run directory into `begun`."""
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Measured for LoRA and full fine-tuning on a GPU (docs/benchmarks.md); on a CPU nothing is gained by it.
    leaf = settings.leaf_modules if settings.leaf_modules is not None else gpu
    ranks_here = _start_processes(
        gpu,
        config,
        gpu and leaf and settings.fetch_ahead and not uses_nvme(config, "offload_param"),
    )
    import torch
    from transformers import TrainingArguments, set_seed
    from transformers.utils import logging as transformers_logging

    from trainer.checkpoint import checkpoints
    from trainer.modeling import attention, linear
    from trainer.modeling import load as models
    from trainer.modeling.activations import AUTO, KeptLayers
    from trainer.monitor.signals import SAVE, STOP, Stopper, dump_stacks_on_signal
    from trainer.monitor.telemetry import Telemetry, heartbeat
    from trainer.monitor.tracking import Tracker
    from trainer.plan.report import Held
    from trainer.trainer import OffloadTrainer

    world_size = torch.distributed.get_world_size()
    if not is_main_process():
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = models.locate(settings.model_name_or_path)
    directory = Path(
        checkpoints.from_main(
            str(run_directory(settings, settings.run_name or default_run_name(settings)))
        )
    )
    run_name = directory.name
    swap_directory = Path(
        checkpoints.from_main(f"{Path(settings.nvme_path).absolute()}/{run_name}-{os.getpid()}")
    )

    def begin():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            swap_dir.take(
                directory / ".running", f"the run {directory}", "make stop, or another --run_name"
            )
            heartbeat(directory, 0, "load")
            if (
                os.environ.get("ZERO_OFFLOAD_SUPERVISED", "1") == "1"
            ):  # what was asked of this run stays asked when it is restarted
                for name in (STOP, SAVE):
                    (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"the run directory {directory} cannot be written to",
                found=error.strerror,
                fix="--output_dir",
            ) from None

    _together(lambda: is_main_process() and begin())
    begun.append(directory)
    dump_stacks_on_signal(directory, torch.distributed.get_rank())

    say(f"configuration: {config_path}")
    say(f"precision: {precision} ({reason}); {'CUDA' if gpu else 'CPU'}, {world_size} rank(s)")
    found = None
    if settings.resume_from_checkpoint:
        found, manifest = checkpoints.choose(directory, settings.resume_from_checkpoint, say)
        if found is None:
            say("resume: no checkpoint yet, so from the beginning")
        else:
            if is_main_process() and settings.resume_from_checkpoint != "auto":
                for path in checkpoints.supersede(directory, manifest["step"]):
                    say(f"resume: {path.name} is of the line that is left here")
            differing = resume.settle(settings, _public(settings), manifest, world_size)
            if differing:
                say(
                    f"resume: what differs from the run that was saved\n\n{resume.table(differing)}\n"
                )
    model_config = models.load_config(name, settings)
    tokenizer, added = models.load_tokenizer(name, settings)
    for what in added:
        say(f"tokenizer: given {what}")
    tokens = data_setup.build(
        data,
        settings,
        tokenizer,
        model_config.get_text_config().vocab_size,
        data_setup.progress("tokenizing"),
    )
    for line in tokens.lines:
        say(line)
    if settings.bind_cores if settings.bind_cores is not None else gpu and ranks_here > 1:
        cores = hardware.bind_cores(int(os.environ["LOCAL_RANK"]), ranks_here, gpu)
        say(
            f"each rank has cores of its own; rank 0 has {len(cores)}, near its GPU where the machine says which these are"
        )

    skeleton = models.skeleton(model_config, settings)
    shapes = models.shapes_of(skeleton, precision)
    parameters = sum(p.numel() for p in skeleton.parameters())
    backend = attention.choose(skeleton, settings, gpu, precision)
    if found:
        checkpoints.check_fits(
            {n: list(p.shape) for n, p in skeleton.named_parameters() if p.requires_grad},
            manifest,
            found,
        )
    del skeleton
    config = resolve_auto(config, shapes, world_size, swap_directory, settings.fused_step)
    check_buffers(config, shapes, world_size, config_path, settings.fused_step)
    hardware.check_locked_memory(*locked_bytes(config, shapes, world_size), ranks_here)
    update_rows = (
        world_size * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    )
    say(
        f"model: {name}, {parameters:,} parameters, {shapes.trainable:,} trained ({settings.method})"
    )
    say(
        f"one update: {world_size} rank(s) x {settings.per_device_train_batch_size} {'packed ' if settings.packing else ''}rows x "
        f"{settings.gradient_accumulation_steps} micro-batches = {update_rows} rows"
    )

    options = settings.training()
    trackers = options.pop("report_to") or []
    trackers = trackers if isinstance(trackers, list) else [trackers]
    if not len(tokens.validation):
        options.update(eval_strategy="no", eval_on_start=False)
        say("validation: no rows, so nothing is measured but the training loss")
    if found:
        options["eval_on_start"] = False  # it was measured when the run began
    liger = models.uses_liger(settings, gpu)
    options.update(
        use_liger_kernel=liger, liger_kernel_config=models.liger_kernels(settings, model_config)
    )
    options.update(
        output_dir=str(directory),
        run_name=run_name,
        deepspeed=config,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not gpu,
        report_to=[t for t in trackers if t not in ("wandb", "all", "none")] or "none",
    )
    try:
        arguments = TrainingArguments(**options)
    except ValueError as error:
        raise RunError(
            "the training arguments do not fit together", found=" ".join(str(error).split())[:400]
        ) from None

    if is_main_process():
        resume.trim_metrics(directory / "metrics.jsonl", manifest["step"] if found else 0)
        settings.values.update(output_dir=str(directory), run_name=run_name)
        _write_resolved(directory, settings, arguments, name)
        if tokens.refused:
            data_setup.write_rejected(directory / "rejected.jsonl", tokens.refused)
            say(f"refused rows: {directory / 'rejected.jsonl'}")
        _print_settings(settings)
    held = Held(
        directory,
        settings,
        config,
        model_config,
        precision,
        gpu,
        (world_size, ranks_here),
        tokens.train.lengths,
        tokens.summary.trained / tokens.summary.tokens,
    )
    set_seed(settings.seed)
    tracker = telemetry = space = saves = None
    try:
        if uses_nvme(config):
            space, first_here = (
                swap_dir.SwapSpace(swap_directory),
                int(os.environ["LOCAL_RANK"]) == 0,
            )
            size = swap_dir.needed_bytes(
                config,
                parameters,
                shapes.trainable,
                shapes.itemsize,
                world_size,
                settings.fused_step,
            )
            _together(
                lambda: first_here and swap_dir.reclaim(settings.nvme_path, say),
                lambda: first_here and space.own(),
            )
            _together(lambda: space.reserve_space(torch.distributed.get_rank(), size, ranks_here))
            swap_dir.watch(space)
        model = models.build(name, model_config, settings, precision, backend)
        if leaf:
            say(f"leaf module: {models.make_leaves(model)}")
        layers = models.decoder_layers(model)
        if settings.fused_linear:
            say(f"fused linear layers: {linear.install(layers, leaf)}")
        wanted = (
            settings.kept_layers
            if settings.kept_layers == AUTO and gpu
            else int(settings.kept_layers.replace(AUTO, "0"))
        )
        kept = (
            wanted
            and settings.gradient_checkpointing
            and KeptLayers(
                layers,
                wanted,
                settings.per_device_train_batch_size * settings.max_length,
                backend == "eager",
                say,
            )
        )
        length = tokens.summary.tokens / tokens.summary.rows
        text = model_config.get_text_config()
        passes = 3 if settings.method == "full" else 2
        flops = passes * (2 * parameters + 2 * text.num_hidden_layers * length * text.hidden_size)
        telemetry = Telemetry(
            directory,
            is_main_process(),
            uses_nvme(config),
            flops,
            int(os.environ["LOCAL_RANK"]) if gpu else None,
        )
        if is_main_process() and ("wandb" in trackers or "all" in trackers):
            tracker = Tracker(directory, run_name, _public(settings))
        facts = {"settings": _public(settings), "versions": _versions(), "data": tokens.key}
        facts["config_hash"] = storage.digest(json.dumps(facts["settings"], sort_keys=True))
        if found and manifest["data"] != tokens.key:
            say(
                "resume: the training rows are not those of the saved run: the order of the new ones goes on at the same step"
            )
        saves = checkpoints.Checkpointer(directory, settings.save_total_limit, facts)
        state_bytes = 12 * shapes.trainable / world_size
        stopper = Stopper(
            directory,
            settings.grace_seconds,
            lambda left: (saves.seconds or state_bytes / 5e8) * 1.2 < left,
            arguments.device,
        )
        trainer = OffloadTrainer(
            model=model,
            args=arguments,
            train_dataset=tokens.train,
            eval_dataset=tokens.validation if len(tokens.validation) else None,
            mixture=tokens.mixture,
            capacity=settings.max_length if settings.packing else None,
            varlen=backend == "varlen",
            processing_class=tokenizer,
            telemetry=telemetry,
            tracker=tracker,
            fused_loss=settings.fused_loss,
            max_nonfinite_steps=settings.max_nonfinite_steps,
            checkpointer=saves,
            stopper=stopper,
            resume=found and (found, manifest),
            space=space,
            kept=kept,
            liger=liger,
            fused_step=settings.fused_step,
            overlap_step=gpu if settings.overlap_step is None else settings.overlap_step,
            offloaded=layers
            if settings.activation_offload and settings.gradient_checkpointing
            else (),
        )
        trainer.train(resume_from_checkpoint=found and str(found))
        if stopper.reason and trainer.state.global_step < trainer.state.max_steps:
            _stopped(trainer, stopper, directory)
            return STOPPED
        if len(tokens.validation) and trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        if settings.export:
            trainer._beat("export")
            _export(trainer, tokenizer, directory, settings, name, [s.shown for s in data.train])
        peaks = sum(
            checkpoints.gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)[
                :ranks_here
            ]
        )
        if is_main_process():
            heartbeat(directory, trainer.state.global_step, "done")
            held.compare(trainer.state.log_history, peaks, space.size() if space else 0)
            _closing_words(trainer, directory, settings)
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU is out of memory",
            found=" ".join(str(error).split())[:200],
            code=FAILED,
            fix="a smaller --per_device_train_batch_size or --max_length, --kept_layers 0, --gradient_checkpointing true, "
            "or a configuration that offloads more",
        ) from None
    finally:
        if telemetry:
            telemetry.close()
        if tracker:
            tracker.finish()
        if space:
            space.close()
        if saves:
            saves.finish()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return DONE


def _public(settings):
    """The settings without secrets: tokens, and what an address may hold besides its path."""
    public = {k: v for k, v in settings.values.items() if k not in SECRET}
    for key in ("dataset", "validation_split"):
        value = public[key]
        public[key] = (
            [storage.shown(v) for v in value]
            if isinstance(value, list)
            else value and storage.shown(value)
        )
    return public


def _write_resolved(directory, settings, arguments, model):
    write_yaml(directory / RESOLVED, {**_public(settings), "model_name_or_path": model})
    (directory / "resolved_ds_config.json").write_text(
        json.dumps(arguments.hf_deepspeed_config.config, indent=2)
    )
    (directory / "versions.json").write_text(json.dumps(_versions(), indent=2))


def _versions():
    versions = {"zero-offload-trainer": __version__, "python": sys.version.split()[0]}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _stopped(trainer, stopper, directory):
    """Say why the run ends here and how it goes on."""
    step = trainer.state.global_step
    if is_main_process():
        kept = trainer.saved.name if trainer.saved else "no checkpoint: it would begin anew"
        kept += "; a new one would not have been written in time" if stopper.unsaved else ""
        print(
            f"\nstopped by {stopper.reason} after step {step}; {kept}\nto go on: {resume.command(directory)}",
            flush=True,
        )
        trainer._beat("stopped")


def _print_settings(settings):
    public = _public(settings)
    rows = [("key", "value", "from")] + [
        (k, str(public[k]), source)
        for k, source in settings.sources.items()
        if k in public and settings.values[k] != all_keys()[k].default
    ]
    print(f"\n{table(rows)}\n", flush=True)


def _evaluations(trainer):
    return [r for r in trainer.state.log_history if "eval_perplexity" in r]


def _export(trainer, tokenizer, directory, settings, name, sources):
    from trainer.export.model import export
    from trainer.export.model_card import model_card

    target = directory / "export"
    say(f"exporting to {target}")
    base = default_model.HUB_NAME if name == str(default_model.model_directory()) else name
    data = ", ".join(
        os.path.relpath(s, ROOT) if Path(s).is_relative_to(ROOT) else s for s in sources
    )
    card = model_card(settings, base, data, _evaluations(trainer), directory)
    limit = parse_size(settings.max_shard_size, "max_shard_size")
    export(trainer.modeling.load, tokenizer, target, card, limit, is_main_process())


def _closing_words(trainer, directory, settings):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    measured = _evaluations(trainer)
    print(f"\ndone: {trainer.state.global_step} updates, peak RAM {peak:.2f} GiB (rank 0)")
    if len(measured) > 1:
        print(
            f"validation perplexity {measured[0]['eval_perplexity']:.2f} -> {measured[-1]['eval_perplexity']:.2f}, token accuracy "
            f"{measured[0]['eval_token_accuracy']:.3f} -> {measured[-1]['eval_token_accuracy']:.3f}"
        )
    print(f"run: {directory}")
    if settings.export and settings.method == "lora":
        print(
            f"adapter: {directory / 'export'}; a merged model: python launch/export.py --merge {directory}"
        )
    elif settings.export:
        print(f"model: {directory / 'export'}")
