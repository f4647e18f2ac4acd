"""On a GPU everything is what it is on the CPU, to the rounding of float32. For whoever has one: `pytest -m gpu`."""

import golden
import nnsight
import pytest
import torch
from families.tiny import CONFIGS, model_of, pairs_of

import ioi_mamba as im
from ioi_mamba.model.families import block_of, layers_with
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.passes.sweep import resample_sweep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

WRITABLE = [site for site in MAMBA.sites if site not in ("h", "conv_slice", "conv_start", "h_start")]


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    """Matrix products and convolutions in float32 as such: the default of convolutions is TF32, of 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on(device, dtype="float32"):
    return im.open_model(str(golden.DIRECTORY), device=device, dtype=dtype)


def near(got, want, rounding=2e-5):
    got, want = got.double().cpu(), want.double().cpu()
    return bool((got - want).abs().max() <= rounding * want.abs().max().clamp(min=1))


def test_every_site_reads_as_on_the_cpu():
    tokens = golden.golden_pairs().clean
    names = [f"blocks.{i}.hook_{site}" for i in range(4) for site in MAMBA.sites if site != "conv_slice"]
    got, want = (im.read(on(device), tokens, names) for device in ("cuda", "cpu"))
    assert {value.device.type for value in got.values()} == {"cuda"}
    assert [name for name in names if not near(got[name], want[name])] == []


@pytest.mark.parametrize("site", [*WRITABLE, "h.7", "conv_slice.-1"])
def test_every_write_moves_the_logits_as_on_the_cpu(site):
    tokens, edit = golden.golden_pairs().clean, {f"blocks.1.hook_{site}": lambda x: 0.7 * x + 0.05}
    got, want = (im.run(on(device), tokens, edit) for device in ("cuda", "cpu"))
    assert near(got, want)
    assert (want - im.run(on("cpu"), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["layer_input", "h", "h_and_conv", "out_proj"])
def test_a_resumed_sweep_is_the_whole_one_and_that_of_the_cpu(site):
    pairs = golden.golden_pairs()
    resumed, whole = (resample_sweep(on("cuda"), pairs, site, resume=resume) for resume in (True, False))
    assert near(resumed, whole)
    assert near(resumed, resample_sweep(on("cpu"), pairs, site))


@pytest.mark.parametrize("options", [{"method": "eap"}, {"positions": True}, {"parts": True}, {"variant": "detached"}])
def test_attribution_is_that_of_the_cpu(options):
    pairs = golden.golden_pairs()
    got, want = (im.attribute(on(device), pairs, **options).table["score"] for device in ("cuda", "cpu"))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_search_decides_as_on_the_cpu_and_edges_patch_alike():
    model = {device: im.open_model("mini", device=device) for device in ("cuda", "cpu")}
    pairs = im.ioi.generate(model["cpu"].tokenizer, 4, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    kept = [list(im.acdc(model[device], pairs, threshold=0.05).table["kept"]) for device in model]
    assert kept[0] == kept[1]
    edges = [("embed", "6"), ("0", "output", 19), ("6", "6", None, "ssm")]
    assert near(*(im.patch_edges(model[device], pairs, edges) for device in model))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_sweeps_attributes_and_searches(dtype):
    model = im.open_model("mini", device="cuda", dtype=dtype)
    pairs = im.ioi.generate(model.tokenizer, 4, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, symmetric=True)
    cpu = im.open_model("mini", device="cpu")
    resumed, whole = (resample_sweep(model, pairs, "layer_input", resume=resume) for resume in (True, False))
    tolerance = 8 * torch.finfo(getattr(torch, dtype)).eps if dtype != "float64" else 1e-5
    assert near(resumed, whole, tolerance)
    assert near(resumed, resample_sweep(cpu, pairs, "layer_input"), 4 * tolerance)
    got, want = (im.attribute(m, pairs, parts=True).table["score"] for m in (model, cpu))
    assert (got - want).abs().max() <= 4 * tolerance
    assert len(im.acdc(model, pairs, threshold=0.05).table)


def test_an_edit_in_a_step_of_a_cached_generation_is_that_of_the_cpu():
    logits = []
    for device in ("cuda", "cpu"):
        model = on(device)
        with model.generate(
            golden.golden_pairs().clean[:2, :6].to(device), max_new_tokens=4, min_new_tokens=4
        ) as tracer:
            seen = nnsight.save([])
            for step in tracer.iter[0:4]:
                with im.mixer(model, 1) as m:
                    if step == 1:
                        m.h[:, -1] = 0.3
                seen.append(model.lm_head.output[:, -1])
        logits.append(torch.stack(seen))
    assert near(*logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_read_written_swept_and_scored_as_on_the_cpu(family):
    """Run with compiled kernels installed and without them: the model's own pass differs, what is edited does not."""
    pairs, models = pairs_of(), [model_of(family, device=device) for device in ("cuda", "cpu")]
    layer = layers_with(models[1], "h")[-1]
    sites = [site for site in block_of(models[1], layer).sites if site != "conv_slice"]
    names = [f"blocks.{layer}.hook_{site}" for site in sites]
    read, own = ([im.read(model, pairs.clean, names, own_scan=scan) for model in models] for scan in (False, True))
    assert [name for name in names for got, want in (read, own) if not near(got[name], want[name], 1e-4)] == []
    for site in ("h.7", "conv_slice.-1", "A_bar", "ssm_input", "out_proj"):
        edit = {f"blocks.{layer}.hook_{site}": lambda x: 0.7 * x + 0.05}
        assert near(*(im.run(model, pairs.clean, edit) for model in models), rounding=1e-4), site
    assert near(*(resample_sweep(model, pairs, "layer_input") for model in models), rounding=1e-4)
    assert near(*(im.patch_flow(model, pairs, [(layer, 4, 8)]) for model in models), rounding=1e-4)
    for table in (
        lambda model: im.attribute(model, pairs, parts=True).table,
        lambda model: im.token_flow(model, pairs),
    ):
        got, want = (table(model)["score"] for model in models)
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    assert len(im.acdc(models[0], pairs, threshold=0.05).table)


def test_memory_is_given_back_after_a_sweep():
    model, pairs = on("cuda"), golden.golden_pairs()
    resample_sweep(model, pairs, "layer_input")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        resample_sweep(model, pairs, "layer_input")
        im.attribute(model, pairs, parts=True)
    assert torch.cuda.memory_allocated() <= before + 2**20
