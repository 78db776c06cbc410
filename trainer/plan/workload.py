"""What the plan's formulas take: a training job, on a machine, with a configuration and a batch.

Does not import torch.
"""

import functools
from dataclasses import dataclass

from trainer.config.device import choose_grad_accum_dtype
from trainer.config.ds_config import DeepSpeedConfig, Tiers, ZeroShapes
from trainer.config.settings import Settings
from trainer.plan.machine import Machine
from trainer.plan.matrices import Matrix
from trainer.plan.model_shapes import ModelSpec

# DeepSpeed's own values, for a JSON that leaves the key out.
DEFAULTS = {
    "reduce_bucket_size": 5 * 10**8,
    "sub_group_size": 10**9,
    "stage3_max_live_parameters": 10**9,
    "stage3_param_persistence_threshold": 10**5,
}
JOB_FLAGS = (
    "method",
    "lora_r",
    "lora_target_modules",
    "max_length",
    "activation_offload",
    "grad_accum_dtype",
)


@dataclass
class TrainingJob:
    """A model and how it is trained. The fields are the flags of the same names, and these:

    tokens_per_step: of an optimizer step on all ranks; None: one micro-batch on each.
    dataset_tokens: of one epoch. kept_layers, kept_weights: None: as many as fit a GPU.
    longest: tokens of the longest row that comes, if that is less than max_length.
    mean: tokens of an average row, with the padding that it gets in its batch.
    labelled: share of the tokens over which the loss is taken. remakes_inputs: layers that keep
    their activations make inputs of linear layers again (modeling/remake.py).
    """

    model: ModelSpec
    method: str = "full"
    lora_r: int = 16
    lora_target_modules: str = "all-linear"
    max_length: int = 2048
    precision: str = "bf16"
    activation_offload: bool = False
    grad_accum_dtype: str | None = None
    tokens_per_step: int | None = None
    dataset_tokens: int | None = None
    overlap_step: bool = True
    gradient_checkpointing: bool = True
    fused_step: bool = True
    resident_weights: bool = True
    remakes_inputs: bool = True
    kept_layers: int | None = None
    kept_weights: int | None = None
    longest: int | None = None
    mean: float | None = None
    labelled: float = 1.0

    @classmethod
    def of_run(
        cls, settings: Settings, model: ModelSpec, precision: str, gpu: bool
    ) -> "TrainingJob":
        """Return the job of a run's settings."""

        def kept(asked: str) -> int | None:
            return int(asked) if asked.isdigit() else None if gpu else 0

        return cls(
            model,
            precision=precision,
            kept_layers=kept(settings.kept_layers),
            kept_weights=kept(settings.kept_weights),
            gradient_checkpointing=settings.gradient_checkpointing,
            fused_step=settings.optimizes("fused_step"),
            resident_weights=settings.optimizes("resident_weights"),
            remakes_inputs=settings.optimizes("fused_linear")
            and settings.optimizes("leaf_modules", gains=gpu)
            and (settings.method == "full" or not settings.lora_dropout),
            overlap_step=settings.optimizes("overlap_step", gains=gpu),
            **{flag: settings.values[flag] for flag in JOB_FLAGS},
        )

    @property
    def full(self) -> bool:
        """Whether all parameters are trained."""
        return self.method == "full"

    @functools.cached_property
    def adapters(self) -> list[list[int]]:
        """The adapters' tensors, as ModelSpec.adapters returns them; [] in a full fine-tune."""
        return [] if self.full else self.model.adapters(self.lora_r, self.lora_target_modules)

    @functools.cached_property
    def adapted(self) -> list[list[Matrix]]:
        """The maps with adapters, as ModelSpec.adapted returns them; [] in a full fine-tune."""
        return [] if self.full else self.model.adapted(self.lora_target_modules)

    @functools.cached_property
    def shapes(self) -> ZeroShapes:
        """The sizes that ZeRO sees."""
        return self.model.shapes(self.precision, self.adapters)


@dataclass
class Workload:
    """A job on a machine with a configuration. micro_batch: rows of one rank.

    config: its "auto" values are resolved here. placed: where a rank's trained elements are; None:
    as config has it; places: as it came out. params_on, optimizer_on: "none" (the GPU), "cpu" or
    "nvme". gathers: whether weights are copied to be used. grad_itemsize: bytes of a gradient in
    the buffer where micro-batches are added, as config says, or else job. locked, ring: bytes of
    one rank's buffers, for parameters and for states on NVMe. trainable: parameters that one rank's
    optimizer has; on_nvme: those whose states are there. machine_share: of all ranks, those of one
    machine. tokens: of the largest micro-batch that comes. layer_bytes, mean_bytes, input_bytes:
    activations of the largest decoder layer, of an average one, and of an input alone; kept_bytes:
    of an average one that keeps them, without what is made again. state_bytes: of a trained
    parameter's states, in RAM or on NVMe. written_bytes: to NVMe, of a trained parameter in an
    optimizer step.
    """

    job: TrainingJob
    machine: Machine
    config: DeepSpeedConfig
    micro_batch: int
    accumulation: int = 1
    placed: Tiers | None = None

    def __post_init__(self) -> None:
        job, machine = self.job, self.machine
        self.model, self.shapes, self.itemsize = job.model, job.shapes, job.shapes.itemsize
        said = self.config.values.get("data_types", {}).get("grad_accum_dtype")
        added = choose_grad_accum_dtype(
            said or job.grad_accum_dtype, job.precision, job.method, self.accumulation
        )
        self.grad_itemsize = 4 if added == "fp32" else 2
        self.on_gpu, self.ranks = machine.gpus > 0, machine.ranks
        self.config = self.config.resolved(self.shapes, self.ranks, "swap")
        self.config.set_precision(job.precision)
        self.zero = {**DEFAULTS, **self.config.zero}
        self.locked = self.config.locked_bytes(self.shapes)
        self.trainable = self.shapes.trainable / self.ranks
        self.params_on, self.optimizer_on = map(self.config.device, ("param", "optimizer"))
        ours = self.optimizer_on == "nvme" or "tiers" in self.config.values
        self.fused_step = job.fused_step or ours
        if self.optimizer_on == "none":  # without offload our step is one in bf16
            self.fused_step &= job.precision == "bf16" and self.params_on == "none"
        self.places = self._places()
        self.on_nvme = self.trainable - self.places.states_in_hbm - self.places.states_in_ram
        self.ring = self.config.ring_bytes(self.shapes, self.ranks) if self.on_nvme else 0
        # Where one GPU holds all, or one CPU process has them in RAM, nothing is copied.
        self.gathers = self.ranks > 1 or self.params_on == "nvme"
        all_on_gpu = job.full and self.places.weights_in_hbm == self.trainable
        self.gathers |= self.params_on == "cpu" and self.on_gpu and not all_on_gpu
        self.machine_share = machine.ranks_here / self.ranks
        length = min(job.longest or job.max_length, job.max_length)
        self.tokens = self.micro_batch * length
        self.layer_bytes, self.mean_bytes, self.input_bytes = self.model.activations(
            self.tokens, self.itemsize, self.on_gpu, job.full, length
        )
        self.kept_bytes = self.mean_bytes
        if job.remakes_inputs:
            sizes = self.tokens, self.itemsize
            self.kept_bytes -= self.model.remade(*sizes, self.on_gpu, job.full)
        # Weight and two moments. A step also writes the parameter, where parameters are on NVMe
        # (stage3.py, _partitioned_params_swap_out).
        self.state_bytes = self.config.state_bytes(self.shapes) if self.fused_step else 12
        self.written_bytes = 0.0
        if self.on_nvme:
            share = self.on_nvme / self.trainable
            self.written_bytes = share * self.state_bytes
            self.written_bytes += self.itemsize * (self.params_on == "nvme")

    def _places(self) -> Tiers:
        """Return where the trained elements of one rank are."""
        trained, tiers = self.trainable, self.placed or self.config.tiers
        if tiers is None:
            here = trained * (self.optimizer_on == "none")
            in_ram = trained * (self.optimizer_on == "cpu")
            return Tiers(trained * (self.params_on == "none"), here, here, in_ram)
        weights, gradients, states, in_ram = (min(size, trained) for size in tiers)
        return Tiers(weights, gradients, states, min(in_ram, trained - states))
