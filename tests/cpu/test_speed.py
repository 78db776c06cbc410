"""Every speed feature changes the time and not the numbers."""
import time

import pytest
from conftest import ROOT
from test_parity import close

FLAGS = ["--max_steps", 12, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.5,
         "--eval_strategy", "no", "--eval_on_start", "false", "--export", "false", "--save_strategy", "no"]
LORA = ["--method", "lora", "--lora_r", 8]
STOCK = ["--fused_linear", "false", "--fused_step", "false", "--fused_loss", "false", "--leaf_modules", "false", "--kept_layers", "0"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_alone(trains, method):
    flags = [*FLAGS, *(LORA if method == "lora" else [])]
    stock = trains("stock", *flags, *STOCK, launcher=False)
    norms = [s["grad_norm"] for s in stock.steps]
    cases = {"step": ["--fused_step", "true"], "leaf": ["--leaf_modules", "true"], "kept": ["--kept_layers", "2"],
             "linear": ["--fused_linear", "true", "--leaf_modules", "true"],
             "all": ["--fused_step", "true", "--leaf_modules", "true", "--kept_layers", "1", "--fused_linear", "true",
                     "--fused_loss", "true"]}
    for name, own in cases.items():
        run = trains(name, *flags, *STOCK, *own, launcher=False)
        close(run.losses, stock.losses, 2e-5)
        assert [s["grad_norm"] for s in run.steps] == pytest.approx(norms, rel=1e-4), name


@pytest.mark.parametrize("config", ["ds_z3", "ds_z3_nvme"])
def test_where_the_step_is_not_ours(trains, config):
    """An optimizer on the GPU or on NVMe keeps DeepSpeed's step; the rest is as everywhere."""
    own = ["--leaf_modules", "true", "--kept_layers", "1", "--deepspeed", f"{config}.json"]
    close(trains("own", *FLAGS, *own, launcher=False).losses, trains("stock", *FLAGS, *STOCK, launcher=False).losses, 2e-5)


SLOW = """
import sys, time
sys.path[0] = {root!r}
from trainer import run
plain = run._start_processes

def start(*args):
    ranks = plain(*args)
    from trainer.offload import host_step
    update = host_step._HostStep._update

    def slowly(*args):
        time.sleep(0.05)
        update(*args)

    host_step._HostStep._update = slowly
    return ranks

run._start_processes = start
run.leave(run.main())
"""


def test_step_beside_the_forward_pass(trains, tmp_path):
    """Bit-equal: every parameter waits for its own update, in training, evaluation, checkpoints and export."""
    from safetensors.torch import load_file

    flags = [*FLAGS[:8], "--eval_strategy", "steps", "--eval_steps", 5, "--save_steps", 6, "--save_total_limit", 5]
    script = tmp_path / "slow.py"  # an update takes longer than the forward pass needs to reach its parameters
    script.write_text(SLOW.format(root=str(ROOT)))
    runs = [trains("false", *flags, launcher=False), trains("true", *flags, "--overlap_step", "true", launcher=False, script=script)]
    assert "in pieces, beside the next forward pass" in runs[1].output and "in pieces, beside" not in runs[0].output
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 12
    assert [e["eval_loss"] for e in runs[0].evaluations] == [e["eval_loss"] for e in runs[1].evaluations]
    for step in (6, 12):
        saved = [sorted((r.directory / f"checkpoint-{step}").glob("rank-*")) for r in runs]
        for left, right in zip(*saved, strict=True):
            assert left.read_bytes() == right.read_bytes(), left
    exports = [load_file(r.directory / "export" / "model.safetensors") for r in runs]
    assert all((exports[0][name] == exports[1][name]).all() for name in exports[0])


def test_two_ranks(trains):
    flags = [*FLAGS[:2], "--max_steps", 12, *FLAGS[6:], "--gradient_accumulation_steps", 1]
    own = ["--leaf_modules", "true", "--kept_layers", "1"]
    two = trains("two", *flags, *own, "--per_device_train_batch_size", 2, "--bind_cores", "true", ranks=2)
    assert "each rank has cores of its own" in two.output
    close(two.losses, trains("stock", *flags, *STOCK, "--per_device_train_batch_size", 4, launcher=False).losses, 1e-4)


@pytest.mark.parametrize("flags, words", [(["--kept_layers", "some"], "kept_layers is not a number"),
                                          (["--kept_layers", "9"], "more than there are"),
                                          (["--use_liger_kernel", "true"], "Liger's kernels cannot run here")])
def test_refused(trains, flags, words):
    assert words in trains("run", *FLAGS, *flags, code=2, launcher=False).output


def test_adam_without_the_interpreters_lock():
    """The same numbers as by DeepSpeed's binding, while another thread goes on."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from trainer.offload import host_step

    size = 30_000_000
    optimizer = DeepSpeedCPUAdam([torch.zeros(1)], lr=1e-3)
    torch.manual_seed(0)
    start = [torch.randn(size) for _ in range(3)] + [torch.rand(size)]  # weights, gradients, moments
    update = host_step.adam_update(optimizer.ds_opt_adam)
    assert update != optimizer.ds_opt_adam.adam_update
    results, pauses = [], []
    for function in (optimizer.ds_opt_adam.adam_update, update):
        tensors = [t.clone() for t in start]
        with ThreadPoolExecutor(1) as pool:
            ticks = [time.perf_counter()]  # before: the thread may take the lock while it is being started
            done = pool.submit(function, optimizer.opt_id, 3, 1e-3, 0.9, 0.999, 1e-8, 0.01, True, *tensors)
            while not done.done():
                ticks.append(time.perf_counter())
            ticks.append(time.perf_counter())
            done.result()
        results.append(tensors)
        pauses.append(max(b - a for a, b in zip(ticks, ticks[1:])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and not torch.equal(results[0][0], start[0])
    assert pauses[1] < pauses[0] / 2, pauses  # seconds for which this thread stood still; the first is the whole update
