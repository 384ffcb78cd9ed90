"""A MODEL rebuilt from its `cached_patcher_init` in a fresh process, as clones on other devices and Ray actors do."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.tests.conftest import ROOT
from wanquant.tests.ops.conftest import HOST


def sample_in_fresh_process(host: str, pack: str, folder: str) -> None:
    """Rebuild the model of `folder`/job, and write its samples there: plain, with a LoRA, and within a budget."""
    import pathlib
    import pickle
    import sys
    import types

    sys.argv = sys.argv[:1]
    sys.path[:0] = [host]
    package = types.ModuleType("wanquant")
    package.__path__ = [pack]
    sys.modules["wanquant"] = package
    from wanquant.testing.host_shims import install

    install()
    from comfy.cli_args import args

    args.cpu = True
    import torch

    from wanquant.tests.ops.loading.test_other_process import samples

    job = pathlib.Path(folder, "job")
    torch.save(samples(*pickle.loads(job.read_bytes())), job.with_name("samples"))


def samples(init, lora):
    """Return the latents of a model: plain, with the LoRA, and with it in the lean forward of Wan Low VRAM."""
    import comfy.sd
    import comfy.utils

    from wanquant.ops import check
    from wanquant.ops.budget.choose_plan import memory_plans
    from wanquant.ops.budget.sampling import with_budget
    from wanquant.ops.budget.sampling_job import SamplingJob
    from wanquant.ops.budget.simulator import Simulator

    load, arguments = init
    with torch.inference_mode():
        model = load(*arguments)
        patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(lora)), 0.7, 0)
        sampling = SamplingJob(check._LATENT).with_entries(cross_attn=torch.empty(check._PROMPT))
        simulator = Simulator.from_patcher(patched)
        smallest = simulator.peak(sampling, memory_plans(simulator.heads)[-1]).total_bytes
        return [check._sampled(each) for each in (model, patched, with_budget(patched, smallest))]


@pytest.fixture
def job(t2v, tmp_path):
    """The folder of a job, and the samples of this process."""
    layer = "diffusion_model.blocks.0.self_attn.q"
    generator = torch.Generator().manual_seed(0)
    factors = {"lora_down": (4, 256), "lora_up": (256, 4)}
    tensors = {f"{layer}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in factors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.inference_mode():
        init = load_diffusion_model(t2v[1], dtype=torch.float32).cached_patcher_init
    content = (init, tmp_path / "lora.safetensors")
    (tmp_path / "job").write_bytes(pickle.dumps(content))
    return tmp_path, samples(*content)


def check(folder, expected):
    got = torch.load(folder / "samples")
    assert not torch.equal(expected[0], expected[1]), "the LoRA has an effect"
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_a_process_gives_the_same_output(job):
    folder, expected = job
    program = f"{inspect.getsource(sample_in_fresh_process)}\nimport sys\nsample_in_fresh_process(*sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        f"from __future__ import annotations\n{program}",
        str(HOST),
        str(ROOT),
        str(folder),
    ]
    subprocess.run(command, check=True)
    check(folder, expected)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install ray")
def test_a_ray_actor_gives_the_same_output(job, monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    class Sampler:
        def sample(self, function, *arguments):
            function(*arguments)

    folder, expected = job
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        actor = ray.remote(Sampler).remote()
        ray.get(actor.sample.remote(sample_in_fresh_process, str(HOST), str(ROOT), str(folder)))
    finally:
        ray.shutdown()
    check(folder, expected)
