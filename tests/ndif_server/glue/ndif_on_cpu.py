"""ndif 0.1.2 without a GPU: the actor classes it is told to use in place of its own. Imported in Ray's workers only."""

# ray and ndif are installed beside the server, not beside the tests.
# pyright: reportMissingImports=false

import gc
import json
import os

import ray
from ndif.services.ray.deployments.controller.cluster.evaluator import CacheEntry, ModelEvaluator
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from transformers import AutoConfig

# A GPU that this machine may have stays unseen; here, because Ray refuses to start its pretended one without devices.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# What placement is told that a model needs; there is no GPU memory to run out of.
NOMINAL_BYTES = 64 << 20

# A runner builds the model's tree from its config, offline like the rest, and is stopped with the rest.
host.RUNNER_ENV = (*host.RUNNER_ENV, "HF_HUB_OFFLINE", "USE_HUB_KERNELS", "IOI_MAMBA_NDIF_SERVER")


class LocalEvaluator(ModelEvaluator):
    """Describes a checkpoint by its config on this disk; ndif's own asks the hub."""

    def _entry(self, model_key, dtype, trust_remote_code):
        if model_key not in self.cache:
            data = json.loads(model_key.split(":", 1)[1])
            config = AutoConfig.from_pretrained(data["repo_id"], revision=data["revision"])
            self.cache[model_key] = CacheEntry(
                NOMINAL_BYTES, 0, config, data["revision"], dtype, trust_remote_code, max_tp=None
            )
        return self.cache[model_key]


class _Controller(_ControllerActor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cluster.evaluator = LocalEvaluator()


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_Controller):
    pass


class CpuModelDeployment(BaseModelDeployment):
    CACHEABLE = False  # parking a model moves its weights off a GPU

    def load_from_disk(self):
        self.gpu_mem_bytes_by_id = {}  # so that nothing asks CUDA for this replica's share
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        """What the GPU's `cleanup` does, without its calls to CUDA."""
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class SandboxedCpuModelDeployment(SandboxModelDeployment, CpuModelDeployment):
    async def run(self, request):
        # Without a database of API keys ndif's API trusts everyone, and a trusted request skips the sandbox.
        request.trusted = False
        await super().run(request)


@ray.remote(num_cpus=1, max_restarts=-1)
class TrustedModelActor(CpuModelDeployment):
    pass


@ray.remote(num_cpus=1, max_restarts=-1)
class SandboxedModelActor(SandboxedCpuModelDeployment):
    pass
