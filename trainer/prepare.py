"""All that can be refused without torch, and what is decided there."""

from dataclasses import dataclass

from trainer import data_setup
from trainer.checkpoint import resume
from trainer.config import device, packages
from trainer.config.ds_config import DeepSpeedConfig
from trainer.config.flags import parse_size
from trainer.config.settings import Settings, check_model
from trainer.console import say
from trainer.data_setup import DataPlan
from trainer.distributed import check_launcher, world_size
from trainer.doctor import cli as doctor
from trainer.engine.version import check_version
from trainer.errors import RunError
from trainer.plan import auto
from trainer.system import swap_dir

SAVEABLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass
class Prepared:
    """What was decided without torch. reason: why this precision."""

    settings: Settings
    config: DeepSpeedConfig
    data: DataPlan
    gpu: bool
    precision: str
    reason: str

    @property
    def leaf_modules(self) -> bool:
        """Whether each decoder layer is fetched as a whole."""
        return self.settings.optimizes("leaf_modules", gains=self.gpu)

    @property
    def fetch_ahead(self) -> bool:
        """Whether the host runs ahead of the GPU."""
        return (
            self.gpu
            and self.leaf_modules
            and self.settings.optimizes("fetch_ahead")
            and self.config.device("param") != "nvme"
        )

    @property
    def fused_step(self) -> bool:
        """Whether gradients and the CPU's optimizer step go our way.

        They do with the optimizer on NVMe, or placed by value: nothing else can step that.
        """
        needed = self.config.device("optimizer") == "nvme" or "tiers" in self.config.values
        return needed or self.settings.optimizes("fused_step")


def prepare(settings: Settings, world: int | None = None) -> Prepared:
    """Refuse all that can be refused without torch. Raises RunError.

    world: ranks that the run will have; None: this process is one of them.
    """
    check_launcher()
    check_version()
    if settings.deepspeed == auto.AUTO:
        auto.choose(settings)
    config = DeepSpeedConfig.load(settings.deepspeed)
    config.agree_with(settings, world or world_size())
    gpu = device.uses_gpu(settings)
    precision, reason = device.choose_precision(settings, config, gpu)
    _choose_grad_accum_dtype(settings, precision)
    _check_optimizer(settings, config)
    packages.check(settings, config)
    parse_size(settings.max_shard_size, "max_shard_size")
    if settings.model_name_or_path is not None:
        check_model(settings.model_name_or_path)
    elif settings.random_weights:
        raise RunError(
            "--random_weights needs a shape", needed="--model_name_or_path with a config.json"
        )
    resume.check_request(settings)
    if config.uses_nvme():
        _check_nvme(settings, config)
    doctor.quick(gpu, config.uses_nvme())
    data = data_setup.plan_data(settings, data_setup.progress("looking at rows"))
    prepared = Prepared(settings, config, data, gpu, precision, reason)
    check_kept_weights(prepared)
    return prepared


def _check_nvme(settings: Settings, config: DeepSpeedConfig) -> None:
    """Raise RunError where swap files cannot be; use none where the plan is free to do so."""
    try:
        swap_dir.check_directory(settings.nvme_path, settings.allow_any_swap_filesystem)
    except RunError as error:
        if not config.places_by_value or config.limit("nvme"):
            raise
        say(f"no NVMe: {error.what}{f', {error.found}' if error.found else ''}")
        config.leave_nvme()


def _choose_grad_accum_dtype(settings: Settings, precision: str) -> None:
    """Let --grad_accum_dtype say fp32 where that is chosen; None is the precision from then on."""
    asked, method = settings.grad_accum_dtype, settings.method
    accumulation = settings.gradient_accumulation_steps
    chosen = device.choose_grad_accum_dtype(asked, precision, method, accumulation)
    if asked is None and chosen != precision:
        settings.set("grad_accum_dtype", chosen, f"{method}, {accumulation} micro-batches")


def check_kept_weights(prepared: Prepared) -> None:
    """Refuse a number that cannot be kept, and let "auto" be 0 there."""
    settings, config = prepared.settings, prepared.config
    wanted = settings.kept_weights
    if wanted == "0":
        return
    needs = {
        "parameters in RAM or on the GPU": config.device("param") != "nvme",
        "leaf_modules, which --disable_optimizations leaves out": prepared.leaf_modules,
    }
    if wanted == "auto":
        distance = config.zero.get("stage3_max_reuse_distance")
        needs |= {
            "a GPU": prepared.gpu,
            "stage3_max_reuse_distance auto": distance == "auto",
            "--kept_layers auto": settings.kept_layers == "auto",
            "--gradient_checkpointing true": settings.gradient_checkpointing,
        }
    for needed, given in needs.items():
        if not given and wanted == "auto":
            if settings.given("kept_weights"):
                settings.set("kept_weights", "0", f"needs {needed}")
            settings.values["kept_weights"] = "0"
            return
        if not given:
            raise RunError(
                "weights cannot stay on the GPU in this run",
                found=f"--kept_weights {wanted}",
                needed=needed,
                fix="leave --kept_weights out",
            )


def _check_optimizer(settings: Settings, config: DeepSpeedConfig) -> None:
    if not settings.given("optim"):
        return
    name = str(settings.optim)
    if settings.save_strategy != "no" and name not in SAVEABLE_OPTIMIZERS:
        raise RunError(
            "this optimizer's state cannot be saved",
            found=f"--optim {name}",
            needed="adamw_torch or adamw_torch_fused, or --save_strategy no",
        )
    if config.device("optimizer") != "none" and name not in SAVEABLE_OPTIMIZERS:
        raise RunError(
            "an offloaded optimizer is DeepSpeed's CPU Adam",
            found=f"--optim {name}",
            fix="leave --optim out, or use --deepspeed ds_z3.json",
        )
