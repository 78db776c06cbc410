"""Every speed feature changes the time and not the numbers."""
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
import ctypes, sys, time
sys.path[0] = {root!r}
from trainer import run
plain = run._start_processes

def start(*args):
    ranks = plain(*args)
    from trainer.offload import gather, host_step
    gather.install()
    handle = gather._Gathered
    gather._Gathered = lambda params, work: print("gathered", len(params)) or handle(params, work)
    run_plain = host_step.run

    def slowly(adam, updates, bits, threads):
        for i in range(len(updates)):
            time.sleep(0.05)
            run_plain(adam, (host_step.Update * 1).from_buffer(updates, i * ctypes.sizeof(host_step.Update)), bits, threads)

    host_step.run = slowly
    return ranks

run._start_processes = start
run.leave(run.main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_beside_the_forward_pass(trains, tmp_path, ranks):
    """Bit-equal: every parameter waits for its own update, in training, evaluation, checkpoints and export; on two ranks also with
    the gathering that GPUs have."""
    from safetensors.torch import load_file

    flags = [*FLAGS[:8], "--eval_strategy", "steps", "--eval_steps", 5, "--save_steps", 6, "--save_total_limit", 5,
             "--leaf_modules", "true"]
    script = tmp_path / "slow.py"  # an update takes longer than the forward pass needs to reach its parameters
    script.write_text(SLOW.format(root=str(ROOT)))
    runs = [trains("false", *flags, ranks=ranks, launcher=ranks > 1),
            trains("true", *flags, "--overlap_step", "true", ranks=ranks, launcher=ranks > 1, script=script)]
    assert "in one pass, beside the next forward pass" in runs[1].output and "in one pass, beside" not in runs[0].output
    assert ("gathered 9" in runs[1].output) == (ranks > 1)  # a decoder layer
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 12
    assert [e["eval_loss"] for e in runs[0].evaluations] == [e["eval_loss"] for e in runs[1].evaluations]
    for step in (6, 12):
        saved = [sorted((r.directory / f"checkpoint-{step}").glob("rank-*")) for r in runs]
        for left, right in zip(*saved, strict=True):
            assert left.read_bytes() == right.read_bytes(), left
    exports = [load_file(r.directory / "export" / "model.safetensors") for r in runs]
    assert all((exports[0][name] == exports[1][name]).all() for name in exports[0])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_ranks(trains, method):
    flags = [*FLAGS[:2], "--max_steps", 12, *FLAGS[6:], "--gradient_accumulation_steps", 1, *(LORA if method == "lora" else [])]
    own = ["--leaf_modules", "true", "--kept_layers", "1"]
    two = trains("two", *flags, *own, "--per_device_train_batch_size", 2, "--bind_cores", "true", ranks=2)
    assert "each rank has cores of its own" in two.output
    close(two.losses, trains("stock", *flags, *STOCK, "--per_device_train_batch_size", 4, launcher=False).losses, 1e-4)


@pytest.mark.parametrize("flags, words", [(["--kept_layers", "some"], "kept_layers is not a number"),
                                          (["--kept_layers", "9"], "more than there are"),
                                          (["--use_liger_kernel", "true"], "Liger's kernels cannot run here")])
def test_refused(trains, flags, words):
    assert words in trains("run", *FLAGS, *flags, code=2, launcher=False).output
