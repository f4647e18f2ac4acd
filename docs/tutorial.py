# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Taking a Mamba apart
#
# Everything here runs on a CPU in about a minute, on `mini`, the small trained model inside the package. **No number
# below is one of mamba-370m**: replace `"mini"` by `"state-spaces/mamba-370m-hf"` on a machine with a GPU for these.
#
# In Colab, upload this notebook and a wheel of the package (`pip wheel --no-deps .` in a checkout makes one), and run
# `%pip install ioi_mamba-0.1.0-py3-none-any.whl` first.

# %%
import os

import altair as alt
import torch

import ioi_mamba as im
from ioi_mamba.analyses import edge_attribution, layer_ablation
from ioi_mamba.passes import metrics

torch.set_num_threads(1)
model = im.open_model("mini", device="cpu")

# %% [markdown]
# ## The task
#
# Three people are introduced, two of them give something: the answer is the third. A pair is a clean prompt and a
# corrupted one in which a single name differs, so that the answer differs too.

# %%
corruption = "ABC AB C -> ABD AB D"
pairs = im.ioi.generate(
    model.tokenizer, 8, seed=27, templates=im.ioi.ALIGNED_TEMPLATES, corruptions=[corruption], symmetric=False
)
print("clean:    ", pairs.texts[0][0])
print("corrupted:", pairs.texts[0][1])
print("roles:    ", pairs.position_labels())

# %% [markdown]
# ## Look at it
#
# Every value inside a layer has a name, the one it has in MambaLens; `ioi-mamba sites` lists them. `read` gives any
# number of them from one forward pass.

# %%
values = im.read(model, pairs.clean, ["blocks.0.hook_B_bar", "blocks.0.hook_h", "blocks.0.hook_conv_slice.-1"])
{name: tuple(value.shape) for name, value in values.items()}

# %% [markdown]
# ## Patch a state
#
# What does the hidden state of each layer hold just before the last token? Write the corrupted run's state there and
# let the recurrence go on. The effect is 0 where the model still acts as on the clean prompt, and 1 where it acts as
# on the corrupted one.

# %%
im.effect(model, pairs, "h", positions=-2).table[["layer", "effect", "low", "high"]]

# %% [markdown]
# The same by hand, in a plain nnsight trace of the stock model. Inside `with im.mixer(...)` the values can be read,
# assigned and changed in place, and the rest of the layer is computed from what was written.

# %%
with model.trace(pairs.clean, use_cache=False):
    with im.mixer(model, 3) as m:
        m.B_bar[:, 4] = 0
        m.h[:, 7] *= 0.5
    edited = model.output.logits.save()
rows = torch.arange(len(pairs))
clean = im.run(model, pairs.clean)
metrics.logit_diff((edited - clean)[rows, pairs.last], pairs.answer, pairs.wrong)

# %% [markdown]
# ## Rewrite a name
#
# Averaged over many prompts, the input of one layer's state space model one token after a name stands for that name.
# Adding one average and subtracting another makes the model read a name that the prompt does not have.

# %%
prompt = "Then, Kelly, Ivan and Leah went to the office. Kelly and Ivan gave a bone to"
print("as it is:           ", im.steer(model, prompt, {}, max_new_tokens=1))
print("Leah read as Mary:  ", im.steer(model, prompt, {"n3": "Mary"}, max_new_tokens=1))

# %% [markdown]
# ## Find the bottleneck
#
# One of the experiments, `layer-ablation`: each layer's input at each position replaced by the corrupted run's.
# `ioi-mamba run layer-ablation --out DIR` does this with more prompts and all corruptions, and writes a report;
# `im.open_result("DIR", "layer-ablation")` then has the same chart, findings and table.

# %%
table = layer_ablation.EXPERIMENT(model, pairs)
print("\n".join(layer_ablation.EXPERIMENT.findings(table)))
layer_ablation.EXPERIMENT.chart(table)

# %% [markdown]
# ## Attribute edges
#
# Every layer reads the sum of what the earlier ones wrote. EAP-IG scores all of these edges from a few backward
# passes; a negative score says that patching the edge with the corrupted run hurts.

# %%
attribution = im.attribute(model, pairs)
print(attribution)

# %% [markdown]
# How much of the task do the ten strongest edges carry? Everything else is patched.

# %%
circuit = attribution.circuit(10)
scores = im.evaluate(model, pairs, circuit)
{name: round(float(scores[name]), 3) for name in ("accuracy", "normalized_logit_diff")}

# %% [markdown]
# ## Draw the circuit
#
# Left the node an edge comes from, right the one it goes to. `edge_attribution.EXPERIMENT` makes the whole table of an
# experiment, and its `chart` the matrix of all edges.

# %%
nodes = circuit.universe.nodes
kept = circuit.to_frame().merge(attribution.table[["source", "target", "score"]])
ends = kept.melt(["score"], ["source", "target"], var_name="end", value_name="node", ignore_index=False).reset_index()
alt.Chart(ends).mark_line(point=True).encode(
    x=alt.X("end:N", title=None, sort=["source", "target"], axis=alt.Axis(labelAngle=0)),
    y=alt.Y("node:N", sort=nodes[::-1], scale=alt.Scale(domain=nodes[::-1])),
    detail="index:N",
    strokeWidth=alt.StrokeWidth("size:Q", legend=None),
    tooltip=["node", "score"],
).transform_calculate(size="abs(datum.score)").properties(width=220, height=260, title="The ten strongest edges")

# %%
texts = edge_attribution.EXPERIMENT.texts("a name")
print(texts["question"])
print(texts["method"])

# %% [markdown]
# ## The same remotely
#
# With `backend="ndif"` the model stays on an NDIF server and every function above is sent there as one request. Set
# `NDIF_HOST` to the address of a server that has the model to try it. Without a server, `"local-serialized"` puts each
# request into the form in which it would travel, and runs that here.

# %%
host = os.environ.get("NDIF_HOST")
remote = im.open_model("mini", backend="ndif", host=host) if host else im.open_model("mini", backend="local-serialized")
there = im.attribute(remote, pairs).table
here = im.attribute(model, pairs).table
print("largest difference of a score:", float((there["score"] - here["score"]).abs().max()))

# %% [markdown]
# A trace of one's own goes there too, with the mixer opened as above.

# %%
with remote.trace(pairs.clean, use_cache=False, remote=True if host else "local"):
    with im.mixer(remote, 3) as m:
        m.B_bar[:, 4] = 0
        m.h[:, 7] *= 0.5
    edited_there = remote.output.logits.save()
assert torch.allclose(edited_there, edited, atol=1e-4)
