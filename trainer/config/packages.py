"""Values of flags that need a package of their own. Does not import torch."""

import importlib.util
import re

from trainer.config.ds_config import DeepSpeedConfig
from trainer.config.settings import Settings
from trainer.errors import RunError, did_you_mean

# --optim: a pattern of its names, the package that has it.
OPTIMIZERS = {
    r"adamw_torch_[48]bit": "torchao",
    r".*_8bit|paged_.*|.*_bnb.*|lion_.*|ademamix.*": "bitsandbytes",
    r"schedule_free_.*": "schedulefree",
    r"grokadamw": "grokadamw",
    r"stable_adamw": "torch-optimi",
    r"adamw_anyprecision": "torchdistx",
    r"adamw_torch_xla": "torch_xla",
    r"adamw_torch_npu_fused": "torch_npu",
    r"adamw_apex_fused": "apex",
}
# They look at a weight as a matrix; under ZeRO-3 an optimizer sees a rank's flat share of it.
OF_MATRICES = r"adafactor|galore_.*|apollo_.*|lomo|adalomo|muon"
# --report_to, beside W&B, which is this trainer's own.
TRACKERS = (
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
)
_PLAIN = ("wandb", "all", "none")
# Packages and modules that have another name than what needs them.
_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit", "comet": "comet_ml"}
_MODULES = {"torch-optimi": "optimi"}


def check(settings: Settings, config: DeepSpeedConfig) -> None:
    """Raise RunError for a value that needs a package that is not there, or that cannot be."""
    for block in ("tensorboard", "comet", "wandb"):  # monitors of DeepSpeed's own
        if config.values.get(block, {}).get("enabled"):
            _need(f"{config.where}: {block}.enabled", block)
    name = str(settings.optim)
    if settings.given("optim"):
        if re.fullmatch(OF_MATRICES, name):
            raise RunError(
                f"--optim {name} needs whole matrices",
                found="ZeRO-3, which gives an optimizer a rank's share of each",
                needed="adamw_torch, or another optimizer that looks at each element alone",
            )
        for pattern, package in OPTIMIZERS.items():
            if re.fullmatch(pattern, name):
                _need(f"--optim {name}", package)
                break
    reports = settings.report_to or []
    for name in [reports] if isinstance(reports, str) else reports:
        if name in _PLAIN:
            continue
        if name not in TRACKERS:
            raise RunError(
                f"--report_to {name} is no tracker{did_you_mean(name, (*TRACKERS, *_PLAIN))}",
                needed=", ".join((*_PLAIN, *TRACKERS)),
            )
        _need(f"--report_to {name}", name)


def _need(what: str, name: str) -> None:
    package = _PACKAGES.get(name, name)
    module = _MODULES.get(package, package)
    if importlib.util.find_spec(module) is None:
        raise RunError(
            f"{what} needs a package that is not installed",
            found=f"no module {module}",
            fix=f"pip install {package}, or leave it out",
        )
