"""Ratios against the usual way, interleaved in one process, medians.

python analyses/benchmark.py dla
python analyses/benchmark.py dla --device cuda --shape xl
python analyses/benchmark.py patching --quick --shape smollm2
python analyses/benchmark.py readers
python analyses/benchmark.py finetune --shape smollm2
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.shapes import NAMES, SHAPES

from lnfree_interp import cli

BENCHMARKS = sorted(
    p.stem for p in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py") if p.stem not in ("common", "shapes")
)


def main() -> None:
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small part, to see that it runs")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args()
    if args.benchmark == "neurons" and args.shape == "smollm2":
        parser.error("--shape smollm2 is not for neurons, which are measured on GPT-2's MLPs and LayerNorm")
    cli.say("loading PyTorch ...")
    import torch

    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else cpu_name()
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    versions = f"torch {torch.__version__}, TransformerLens {version('transformer_lens')}"
    print(f"{args.benchmark}, {NAMES[args.shape]}, {where}{threads}, {versions}")
    table = importlib.import_module(f"benchmarks.{args.benchmark}").run(args)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    if args.csv:
        table.to_csv(args.csv, index=False)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
