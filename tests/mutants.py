"""Faults made on purpose, each to be caught by the tests of its room: `python -m tests.mutants [WORD...]`.

Each fault is one replacement in one file of a copy of the package; then the named tests run. A fault that no test notices
survives: it is printed, and the exit code is its number. WORD: only faults whose file or tests contain one of these.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
AT_ONCE = os.cpu_count() or 1


class Fault(NamedTuple):
    """`old` becomes `new` where it first stands in `file`; `tests` are what should notice, as pytest takes them."""

    file: str
    old: str
    new: str
    tests: str


SCAN, MIXER, SWEEP = "tests/model/test_scan.py", "tests/model/test_mixer.py", "tests/passes/test_sweep.py"
METRICS, INTERVALS, RANGES = (f"tests/passes/test_{name}.py" for name in ("metrics", "intervals", "ranges"))
GRAPH, PATCHING, ACDC, PARTS = (f"tests/circuits/test_{name}.py" for name in ("graph", "patching", "acdc", "parts"))
ATTRIBUTION, FAITHFULNESS = "tests/circuits/test_attribution.py", "tests/circuits/test_faithfulness.py"
PAIRS, IOI, EFFECTS = "tests/tasks/test_pairs.py", "tests/tasks/test_ioi.py", "tests/analyses/test_effects.py"
FAMILIES, ZAMBA = "tests/families", "tests/families -k zamba"
RELEVANCE, OPEN = "tests/circuits/test_relevance.py", "tests/analyses/test_open_questions.py"
CHUNKS = "tests/study/test_chunks.py"
FEATURES, DICTIONARIES = "tests/circuits/test_features.py", "tests/circuits/test_dictionaries.py"
ABLATED, STABILITY = "tests/circuits/test_ablated.py", "tests/circuits/test_stability.py"
STABLE = "tests/analyses/test_circuit_stability.py"
EXTENSIONS, SURFACE = "tests/project/test_extensions.py", "tests/project/test_surface.py"

FAULTS = (
    # features
    Fault(
        "ioi_mamba/circuits/features.py",
        "change = self.decoded(moved) - found",
        "change = self.decoded(moved - here)",
        FEATURES,
    ),
    Fault(
        "ioi_mamba/circuits/features.py",
        "error = (values[1] - self.decoded(other)) - (values[0] - found)",
        "error = values[1] - values[0]",
        FEATURES,
    ),
    Fault("ioi_mamba/circuits/features.py", "at_features * (other - here)", "at_features * other", FEATURES),
    Fault("ioi_mamba/circuits/patching.py", "if features[:, columns].any()]", "if False]", FEATURES),
    Fault("ioi_mamba/circuits/dictionaries.py", "sums > self.threshold.to(value).relu()", "sums > 0", DICTIONARIES),
    Fault(
        "ioi_mamba/circuits/dictionaries.py",
        'shift=None if transcodes else tensors["b_dec"]',
        "shift=None",
        DICTIONARIES,
    ),
    Fault(
        "ioi_mamba/circuits/dictionaries.py",
        "for sides in values for side in sides.values()",
        "for sides in values for side in [sides['clean']]",
        DICTIONARIES,
    ),
    Fault("ioi_mamba/model/scanned_layer.py", 'drive = self._values["ssm_write"].clone()', "pass", MIXER),
    # the three that survived once
    Fault(
        "ioi_mamba/passes/sweep.py", "(corrupted - clean)[:, ahead - 1 :]", "(clean - corrupted)[:, ahead - 1 :]", SWEEP
    ),
    Fault(
        "ioi_mamba/passes/sweep.py", "x[-len(value) :, at] = value[:, 0]", "x[: len(value), at] = value[:, 0]", SWEEP
    ),
    Fault("analyses/_effects.py", "own.unique(return_inverse=True)[1])", "torch.arange(len(own)))", EFFECTS),
    Fault(
        "ioi_mamba/circuits/search.py",
        "self.state.baseline - score <= self.rollback",
        "self.state.baseline - score <= self.threshold",
        ACDC,
    ),
    # chunks that are kept
    Fault("ioi_mamba/remote/store.py", "hashlib.sha256(content).digest() != digest", "False", CHUNKS),
    Fault("ioi_mamba/remote/store.py", "_feed(digest, [work, *args])", "_feed(digest, [work, *args[:1]])", CHUNKS),
    Fault("ioi_mamba/remote/store.py", "[surroundings, code_hash()]", "[code_hash()]", CHUNKS),
    Fault("ioi_mamba/remote/jobs.py", "in enumerate(chunks) if k not in found}", "in enumerate(chunks)}", CHUNKS),
    # the scan and the mixer
    Fault(
        "ioi_mamba/model/scan.py",
        "h.mul_(decay).addcmul_(dx_t, B_t)",
        "h.mul_(decay).addcmul_(dx_t, B_t).mul_(1.0001)",
        SCAN,
    ),
    Fault("ioi_mamba/model/compiled_scan.cpp", "T(LN_2) * gd[e]", "gd[e]", SCAN),
    Fault("ioi_mamba/model/compiled_scan.cpp", "h_n[e] * power_of_two", "h_n[e] * T(1.0001) * power_of_two", SCAN),
    Fault("ioi_mamba/model/compiled_scan.cpp", "std::fill(ga.begin(), ga.end(), T(0));", "", SCAN),
    Fault("ioi_mamba/model/compiled_scan.py", "1 if in_one else", "", "tests/model/test_compiled_scan.py"),
    Fault(
        "ioi_mamba/model/scan.py",
        "g[:, t].addcmul_(a[:, t + 1], g[:, t + 1])",
        "g[:, t].addcmul_(a[:, t], g[:, t + 1])",
        SCAN,
    ),
    Fault(
        "ioi_mamba/model/scan.py",
        "torch.mul(g[:, 1:], h[:, :-1], out=grad_a[:, 1:])",
        "torch.mul(g[:, 1:], h[:, 1:], out=grad_a[:, 1:])",
        SCAN,
    ),
    Fault(
        "ioi_mamba/model/scan.py",
        "B_bar = delta[..., None] * B[:, :, None, :]",
        "B_bar = B[:, :, None, :].expand(*A_bar.shape)",
        SCAN,
    ),
    Fault(
        "ioi_mamba/model/scanned_layer.py",
        "first = width - 1 + s",
        "first = -s",
        f"{MIXER} tests/model/test_sites.py",
    ),
    Fault(
        "ioi_mamba/model/scanned_layer.py",
        "torch.where(mask, 0.0, decay), torch.where(mask, value, drive)",
        "torch.where(mask, 1.0, decay), torch.where(mask, value, drive)",
        MIXER,
    ),
    Fault(
        "ioi_mamba/model/mamba/layer.py",
        'return self.get("y") + self._call.x * self._call.D',
        'return self.get("y") - self._call.x * self._call.D',
        f"{MIXER} tests/model/test_sites.py",
    ),
    Fault(
        "ioi_mamba/model/mamba/layer.py",
        'self.get("ssm_output") * F.silu(self._call.z)',
        'self.get("ssm_output") * torch.sigmoid(self._call.z)',
        MIXER,
    ),
    Fault(
        "ioi_mamba/model/mamba/layer.py",
        'return F.softplus(self.get("delta_2"))',
        'return self.get("delta_2").exp()',
        f"{MIXER} tests/model/test_sites.py",
    ),
    Fault(
        "ioi_mamba/model/mixer.py",
        "if handed._version != version:",
        "if handed._version == version:",
        "tests/model/test_traces.py",
    ),
    Fault(
        "ioi_mamba/model/mixer.py", "self[:] = self + other", "self[:] = self - other", SURFACE + " -k like_a_tensor"
    ),
    Fault(
        "ioi_mamba/model/sites.py",
        "str(int(found[0]) % self.n_positions)",
        "str(int(found[0]) % len(self.blocks))",
        SURFACE + " -k patterns",
    ),
    # passes
    Fault(
        "ioi_mamba/passes/sweep.py",
        "begun = begins <= p if spread.ablation.like_corrupted",
        "begun = begins < p if spread.ablation.like_corrupted",
        SWEEP,
    ),
    Fault(
        "ioi_mamba/passes/sweep.py",
        "logits_at=(read_at - begin).repeat(n_sets, 1)",
        "logits_at=read_at.repeat(n_sets, 1)",
        SWEEP,
    ),
    Fault(
        "ioi_mamba/passes/sweep.py",
        "resumes = resume and (pairs.readout is None or not by_position)",
        "resumes = resume",
        EXTENSIONS + " -k two_tokens",
    ),
    Fault(
        "ioi_mamba/passes/metrics.py",
        "return logits[..., 0] - logits[..., 1]",
        "return logits[..., 1] - logits[..., 0]",
        METRICS,
    ),
    Fault(
        "ioi_mamba/passes/metrics.py",
        "possible_range = (clean - corrupted).abs()",
        "possible_range = clean - corrupted",
        METRICS,
    ),
    Fault(
        "ioi_mamba/passes/metrics.py",
        "(sums / values.shape[-1]).square().sum(-1)",
        "(sums / n_clusters).square().sum(-1)",
        f"{METRICS} {INTERVALS}",
    ),
    Fault(
        "ioi_mamba/passes/metrics.py",
        "return value >= bound - ROUNDING",
        "return value > bound",
        "tests/claims/test_compare.py tests/analyses/test_layer_removal.py",
    ),
    Fault(
        "ioi_mamba/passes/intervals.py",
        "special.stdtrit(n_clusters - 1, 0.975)) if n_clusters > 1",
        "special.stdtrit(n_clusters - 1, 0.95)) if n_clusters > 1",
        INTERVALS,
    ),
    Fault("ioi_mamba/passes/intervals.py", "clamp(1, alike)", "clamp(1, 1)", INTERVALS),
    Fault("ioi_mamba/passes/ranges.py", "> rounding.clamp(min=SMALLEST)", "> 0 * rounding", RANGES),
    Fault("ioi_mamba/passes/effect.py", "return value % n", "return abs(value)", SURFACE + " -k effect"),
    # tasks
    Fault(
        "ioi_mamba/tasks/base.py",
        "answer=self.wrong,\n            wrong=self.answer,",
        "answer=self.answer,\n            wrong=self.wrong,",
        f"{PAIRS} {IOI}",
    ),
    Fault("ioi_mamba/tasks/base.py", "differs.int().argmax(1)", "differs.int().argmax(1) + 1", PAIRS),
    Fault(
        "ioi_mamba/tasks/base.py",
        'first.scatter_reduce_(0, prompt, cluster.repeat(2), "amin")',
        'first.scatter_reduce_(0, prompt, cluster.repeat(2), "amax")',
        f"{PAIRS} {INTERVALS}",
    ),
    Fault("ioi_mamba/tasks/ioi.py", "rng.shuffle(names)", "names.sort()", IOI),
    Fault(
        "ioi_mamba/tasks/prompts.py", 'else f"<mark>{shown}</mark>"', "else shown", SURFACE + " -k difference_marked"
    ),
    Fault("ioi_mamba/tasks/prompts.py", "shown = html.escape(", "shown = str(", SURFACE + " -k difference_marked"),
    Fault("ioi_mamba/tasks/readout.py", ".sum(-2)", ".amax(-2)", EXTENSIONS + " -k two_tokens"),
    Fault("ioi_mamba/tasks/draws.py", "seed + STEP * number", "seed", "tests/analyses/test_cross_talk.py"),
    # circuits
    Fault(
        "ioi_mamba/circuits/graph.py",
        "for j in range(1, len(places)) for i in range(j)",
        "for j in range(1, len(places)) for i in range(max(0, j - 1))",
        GRAPH,
    ),
    Fault("ioi_mamba/circuits/graph.py", "if i.source in live and i.target in live", "if i.source in live", GRAPH),
    Fault(
        "ioi_mamba/circuits/graph.py",
        "len(self.items & other.items) / len(union)",
        "len(self.items & other.items) / len(self.items)",
        GRAPH,
    ),
    Fault(
        "ioi_mamba/circuits/patching.py",
        "by_row[rows] * (self._made(w, part, rows) - x[rows])",
        "by_row[rows] * (x[rows] - self._made(w, part, rows))",
        PATCHING,
    ),
    Fault("ioi_mamba/model/mamba/kind.py", 'leads_to="ssm",', "leads_to=None,", f"{ACDC} {PARTS}"),
    Fault("ioi_mamba/model/mamba/kind.py", "on_path=True,", "on_path=False,", ATTRIBUTION),
    Fault(
        "ioi_mamba/model/mamba/kind.py",
        'now=("A", "C"),\n        made=read_out,',
        'now=("A", "C"),',
        PATCHING,
    ),
    Fault(
        "ioi_mamba/circuits/gradients.py", "made.to(wide) - now[part.own]", "now[part.own] - made.to(wide)", ATTRIBUTION
    ),
    Fault("ioi_mamba/circuits/search.py", "if part.name not in led_to]", "]", PARTS),
    Fault(
        "ioi_mamba/circuits/gradients.py",
        "change = [c.to(wide) - o for c, o",
        "change = [o - c.to(wide) for c, o",
        ATTRIBUTION,
    ),
    Fault(
        "ioi_mamba/circuits/methods.py",
        "alphas = [k / (options.steps - 1) for k",
        "alphas = [k / options.steps for k",
        ATTRIBUTION,
    ),
    Fault("ioi_mamba/circuits/methods.py", "alphas[:-1] if dispensable", "alphas[:-2] if dispensable", ATTRIBUTION),
    Fault(
        "ioi_mamba/circuits/ranking.py",
        'if order == "signed" else -np.abs(values)',
        'if order == "signed" else np.abs(values)',
        f"{ATTRIBUTION} {FAITHFULNESS}",
    ),
    Fault(
        "ioi_mamba/circuits/ranking.py",
        "return [list(self.items[k:]) for k in sizes]",
        "return [list(self.items[:k]) for k in sizes]",
        FAITHFULNESS,
    ),
    Fault(
        "ioi_mamba/circuits/scoring.py",
        "(low, middle - 1) if above(middle, low, high) else (middle, high)",
        "(low, middle - 1) if not above(middle, low, high) else (middle, high)",
        FAITHFULNESS,
    ),
    Fault(
        "ioi_mamba/circuits/scoring.py",
        "return (logit_diff.mean(-1) - empty) / (full - empty)",
        "return logit_diff.mean(-1) / full",
        FAITHFULNESS,
    ),
    Fault(
        "ioi_mamba/circuits/search.py",
        "if self.state.baseline - score <= self.threshold:",
        "if self.state.baseline - score < -self.threshold:",
        ACDC,
    ),
    # experiments, registry and pages
    Fault(
        "ioi_mamba/experiments/options.py",
        "Field(ge=option.at_least, le",
        "Field(le",
        f"{EXTENSIONS} tests/cli/test_cli.py",
    ),
    Fault(
        "ioi_mamba/experiments/experiment.py", "if not self.nullable and values.isna().any():", "if False:", EXTENSIONS
    ),
    Fault("ioi_mamba/registry.py", "if len(own) != 1:", "if not own:", EXTENSIONS),
    Fault(
        "ioi_mamba/report/templates/report.html.j2",
        "{% if is_papers and s.experiment.paper %}Paper",
        "{% if true %}Paper",
        EXTENSIONS,
    ),
    Fault(
        "ioi_mamba/steering/steer.py",
        "mentioned.get(ids.get(key, -1), [key])",
        "mentioned.get(ids.get(key, -1), [key])[:1]",
        SURFACE + " -k steered_by_name",
    ),
    # families
    Fault(
        "ioi_mamba/model/ssd.py",
        "h = h * from_start[:, -1].exp()[..., None, None] +",
        "h = h +",
        "tests/model/test_ssd.py",
    ),
    Fault("ioi_mamba/model/ssd.py", ".flip(1).cumsum(1).flip(1) - exponent", ".flip(1).cumsum(1).flip(1)", FAMILIES),
    Fault(
        "ioi_mamba/model/mamba2/layer.py",
        ".clamp(self._call.low, self._call.high)",
        ".clamp(min=0)",
        FAMILIES + " -k mamba2",
    ),
    Fault(
        "ioi_mamba/model/families/falcon_h1.py",
        "normalized * self._config.attention_in_multiplier",
        "normalized",
        FAMILIES + " -k falcon_h1",
    ),
    Fault(
        "ioi_mamba/model/families/falcon_h1.py",
        "[E, E, GN, GN, H]",
        "[E, E, GN, GN, H][::-1]",
        FAMILIES + " -k falcon_h1",
    ),
    Fault(
        "ioi_mamba/model/families/zamba2.py",
        "read.input + (value - copied)",
        "read.input",
        FAMILIES + " -k zamba2",
    ),
    Fault("ioi_mamba/model/families/zamba.py", "calls.gate = given[..., 1]", "calls.gate = given[..., 0]", ZAMBA),
    Fault(
        "ioi_mamba/model/families/zamba.py",
        "permute(1, 3, 0, 2).flatten(2)  #",
        "permute(1, 3, 2, 0).flatten(2)  #",
        ZAMBA,
    ),
    Fault("ioi_mamba/model/families/zamba.py", "self._kept.copy_(written", "self._kept.add_(written", ZAMBA),
    Fault(
        "ioi_mamba/model/families/zamba.py",
        "own = slice(head * width, (head + 1) * width)",
        "own = slice(0, width)",
        ZAMBA,
    ),
    # flows, relevance and decoding
    Fault(
        "ioi_mamba/model/ssd.py", "left * A_bar[:, t, None]", "left * A_bar[:, t - 1, None]", FAMILIES + " -k unrolled"
    ),
    Fault("ioi_mamba/model/mamba2/layer.py", "+ left * from_start", "", FAMILIES + " -k cached_generation"),
    Fault(
        "ioi_mamba/model/scan.py",
        "held[:, :t].mul_(decay[:, t, None])",
        "held[:, :t].mul_(decay[:, t - 1, None])",
        SCAN,
    ),
    Fault(
        "ioi_mamba/model/mamba/kind.py", "weight[:, 0, t, : t + 1]", "weight[:, 0, : t + 1, t]", FAMILIES + " -k flow"
    ),
    Fault("ioi_mamba/circuits/flow.py", "return of(*there) - of(", "return of(*there) + of(", FAMILIES + " -k flow"),
    Fault(
        "ioi_mamba/circuits/flow.py",
        "flow.target, flow.source] = 1",
        "flow.source, flow.target] = 1",
        FAMILIES + " -k flow",
    ),
    Fault("ioi_mamba/circuits/flow.py", "- normalized_logit_diff(ends[0], *ends)", "", FAMILIES + " -k exact_score"),
    Fault("ioi_mamba/circuits/relevance.py", "(torch.sigmoid(conv), conv)", "(F.sigmoid(2 * conv), conv)", RELEVANCE),
    Fault("ioi_mamba/circuits/relevance.py", "share = 0.5 if", "share = 1.0 if", RELEVANCE),
    Fault("ioi_mamba/circuits/relevance.py", "scale * o * torch.sigmoid(z)", "scale * o * F.silu(z)", RELEVANCE),
    Fault("ioi_mamba/circuits/relevance.py", '("delta", "B", "C")', '("delta", "B")', RELEVANCE),
    Fault("ioi_mamba/circuits/decoding.py", "(factor * (out - y))", "(factor * out)", OPEN),
    Fault(
        "ioi_mamba/circuits/decoding.py",
        "for name in sink_hooks(nodes)[:-1]}",
        "for name in sink_hooks(nodes)[:1]}",
        OPEN,
    ),
    # kinds of ablation, and circuits that draws agree on
    Fault(
        "ioi_mamba/passes/ablations.py",
        "groups[rows] = k * n_positions + positions",
        "groups[rows] = positions",
        ABLATED + " -k node",
    ),
    Fault("ioi_mamba/passes/ablations.py", "groups[rows, at.cpu()[rows]] = k", "pass", ABLATED + " -k node"),
    Fault("ioi_mamba/circuits/patching.py", "(part.own,) if part.is_term else ()", "()", ABLATED + " -k part"),
    Fault("ioi_mamba/circuits/scoring.py", "if spread is not None:", "if False:", ABLATED + " -k nothing_kept"),
    Fault("ioi_mamba/circuits/search.py", "paper, resampled)", "paper, True)", ABLATED + " -k search"),
    Fault("ioi_mamba/circuits/stability.py", "(ranks < size)", "(ranks <= size)", STABILITY),
    Fault("ioi_mamba/circuits/stability.py", "total / share.clamp(min=1e-12)", "total", STABILITY),
    Fault("analyses/circuit_stability.py", "not in kept\n", "in kept\n", STABLE + " -k role"),
    Fault("analyses/token_flow.py", "found[i, t, t - k] = score[t]", "found[i, t - k, t] = score[t]", OPEN),
    Fault("analyses/decoding.py", "scores[0] - patched", "patched - scores[0]", OPEN),
    Fault(
        "analyses/_roles.py",
        "own = [label if label in labels else OTHER",
        "own = [label if label in labels else labels[0]",
        OPEN,
    ),
    Fault(
        "ioi_mamba/model/layer_pass.py",
        "            value = value / getattr(self._config, end.times)\n",
        "            pass\n",
        FAMILIES + " -k granite",
    ),
    Fault(
        "ioi_mamba/model/layer_pass.py",
        "            value = value - other\n",
        "            pass\n",
        FAMILIES + " -k granite",
    ),
    Fault(
        "ioi_mamba/model/layer_pass.py",
        'self._values["resid_mid"] - sum(rest[1:], rest[0])',
        'self._values["resid_mid"] - rest[0]',
        FAMILIES + " -k falcon_h1",
    ),
    Fault(
        "ioi_mamba/passes/sweep.py",
        "begin = p if resumes and by_position else 0",
        "begin = p if resumes else 0",
        FAMILIES + " -k bamba",
    ),
    Fault(
        "ioi_mamba/circuits/graph.py",
        "for i in range(j) if places[i] != places[j]",
        "for i in range(j)",
        FAMILIES + " -k falcon_h1",
    ),
    Fault("ioi_mamba/errors.py", "not in _INSIDE", "in _INSIDE", SURFACE + " -k error_in_a_trace"),
)


def survives(fault: Fault) -> bool:
    """Whether no test notices it. Raises ValueError where the file no longer has what is to be replaced."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        home = Path(folder)
        leave = shutil.ignore_patterns("__pycache__")
        for name in ("analyses", "tests", "docs", "bench"):
            shutil.copytree(ROOT / name, home / name, ignore=leave)
        shutil.copytree(ROOT / "ioi_mamba", home / "ioi_mamba", ignore=leave, symlinks=True)
        for name in ("pyproject.toml", "README.md", "mkdocs.yml"):
            shutil.copy(ROOT / name, home / name)
        target = home / fault.file
        source = target.read_text()
        if source.count(fault.old) < 1:
            raise ValueError(f"{fault.file} no longer has {fault.old!r}")
        target.write_text(source.replace(fault.old, fault.new, 1))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *fault.tests.split(" -k ")[0].split(),
        ]
        if " -k " in fault.tests:
            command += ["-k", fault.tests.split(" -k ")[1]]
        environment = os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"the tests of {fault.file} do not run: {done.stdout[-500:]}{done.stderr[-500:]}")
        return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the faults; how many survive."""
    chosen = [
        fault for fault in FAULTS if not words or any(word in fault.file or word in fault.tests for word in words)
    ]
    alive = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, (fault, lives) in enumerate(zip(chosen, pool.map(survives, chosen), strict=True), 1):
            print(
                f"{number}/{len(chosen)} {'SURVIVES' if lives else 'caught'}: {fault.file}: {fault.new[:70]!r}",
                flush=True,
            )
            alive += [fault] if lives else []
    print(f"{len(chosen)} faults, {len(alive)} survive")
    return len(alive)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
