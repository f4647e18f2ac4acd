"""Other processors, imitated: `python -m tests.processors` runs the tests of numbers once more on each of them.

Torch and the libraries below it choose their operations by what the processor offers, so the same sum is taken in
another order, and rounded otherwise, on another one. Variables of these libraries ask for less than is there.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# docs/reliability.md says which variable changes what.
PROCESSORS = {
    "one without AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "one with AVX2 and no more": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
# What computes and compares numbers; the other files are about text, files, pages and servers.
FILES = ["acdc", "attribution", "checkpoints", "circuit_analyses", "cli", "cross_talk", "determinism", "dtypes"]
FILES += ["effects", "faithfulness", "graph", "greater_than", "intervals", "interventions", "layer_removal", "memory"]
FILES += ["metrics", "mini", "ranges", "tokenizers", "traces"]
FILES += ["missing_names", "mixer", "models", "name_steering", "names_summary", "numerics", "pairs", "patching"]
FILES += ["scan", "sites", "state_similarity", "study", "sweep", "wrongness"]


def on(name, command, **options):
    """Run a command as on that processor ("" is the one that is here), with one thread; options as of `subprocess.run`."""
    own = {key: value for key, value in os.environ.items() if not any(key in each for each in PROCESSORS.values())}
    own |= {"OMP_NUM_THREADS": "1", "USE_HUB_KERNELS": "0", "HF_HUB_OFFLINE": "1"} | PROCESSORS.get(name, {})
    return subprocess.run(command, cwd=ROOT, env=own | {"PYTHONPATH": str(ROOT)}, **options)


def main():
    """Exit code 0 if all tests pass on each imitated processor, those of tests/project/test_processors.py included."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "auto",
        "--maxprocesses",
        "8",
        *(str(path) for name in FILES for path in ROOT.glob(f"tests/*/test_{name}.py")),
        "-m",
    ]
    worst = 0
    for name in PROCESSORS:
        print(f"On {name}:", flush=True)
        worst = max(worst, on(name, [*command, "not gpu and not remote and not network and not slow"]).returncode)
    print("Each against the others:", flush=True)
    return max(worst, on("", [*command[:7], "tests/project/test_processors.py", "-m", "slow or not slow"]).returncode)


if __name__ == "__main__":
    sys.exit(main())
