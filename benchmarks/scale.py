"""Synchronous against asynchronous on 8 to 10,000 accelerators, simulated: a 7B model that writes long answers.

    python benchmarks/scale.py                    # up to 10,000 accelerators: about 5 minutes of one core
    python benchmarks/scale.py --accelerators 64  # about 90 seconds

What it rests on, all of it here and none of it measured on such machines:

- The model has the shape of Qwen2.5-7B (7.6e9 parameters, 28 layers, 4 key-value heads of 128), in bfloat16; an
  accelerator is an H100 SXM by its data sheet (989e12 FLOP/s, 3.35e12 byte/s), and one engine or one trainer each.
- Decoding is bound by memory: a step reads the weights once and the cache of every running sample, at `BANDWIDTH_SHARE`
  of the data sheet's rate, and does 2 FLOP per parameter and sample. Prompts are read, samples scored (2) and trained
  (6 FLOP per parameter and token) at `MFU`, of the range 0.31 to 0.40 that verl publishes for training. Attention's own
  FLOP and all traffic between trainers are left out, so are restarts, stragglers and memory that is too small.
- The optimizer reads and writes 16 bytes per parameter; the weights arrive in 0.12 s (verl's figure for 7B); rewards
  are rules, which take no time.
- Lengths are log-normal, cut at 27,000 tokens; each step has 16 responses for every accelerator, 16 to a prompt of 1024
  tokens. There is one scoring pass (old log-probs) and one update per step. A quarter of the accelerators train, as
  AReaL splits them.
- Engines and trainers that take turns change places for nothing, which favours the synchronous baseline.

The first tables are by number of accelerators. The others, on `--vary-at` of them, are by how skewed the lengths are
and by how many responses a step has for every accelerator, each with several shares that train: what the speed-up hangs
on.
Speed-ups that the peers publish: AReaL 2.77, verl 1.9 to 2.7, ROLL 2.2 to 2.7.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.console import Console

from engine.schedule.costs import Costs
from engine.simulation.lengths import LogNormal
from engine.simulation.scenario import Workload
from engine.simulation.sweep import LEGEND, Compared, sweep, table_of

PARAMETERS, LAYERS, KV_VALUES = 7.6e9, 28, 4 * 128
FLOPS, BANDWIDTH = 989e12, 3.35e12
BANDWIDTH_SHARE, MFU = 0.7, 0.35
BYTES = 2
RESPONSES_PER_ACCELERATOR, SAMPLES_PER_PROMPT = 16, 16
MEAN, LONGEST = 8000, 27_000

COSTS = Costs(
    decode_step_s=BYTES * PARAMETERS / (BANDWIDTH * BANDWIDTH_SHARE),
    decode_sample_s=2 * PARAMETERS / (FLOPS * MFU),
    decode_context_s=2 * KV_VALUES * LAYERS * BYTES / (BANDWIDTH * BANDWIDTH_SHARE),
    prefill_token_s=2 * PARAMETERS / (FLOPS * MFU),
    forward_token_s=2 * PARAMETERS / (FLOPS * MFU),
    train_token_s=6 * PARAMETERS / (FLOPS * MFU),
    update_s=16 * 2 * PARAMETERS / (BANDWIDTH * BANDWIDTH_SHARE),
    publish_s=0.12,
    reward_s=0.0,
)


def workload(sigma: float, steps: int, responses: int = RESPONSES_PER_ACCELERATOR) -> Workload:
    """For 8 accelerators; others have proportionally more prompts."""
    return Workload(
        lengths=LogNormal(MEAN, sigma),
        steps=steps,
        prompts_per_step=8 * responses // SAMPLES_PER_PROMPT,
        samples_per_prompt=SAMPLES_PER_PROMPT,
        prompt_tokens=1024,
        max_new_tokens=LONGEST,
        concurrent_samples=64,
        scoring_passes=1,
    )


def scaled(
    work: Workload, accelerators: Sequence[int], *, shares: Sequence[float], staleness: Sequence[int]
) -> list[Compared]:
    """The runs of one table."""
    return list(
        sweep(work, COSTS, accelerators=accelerators, shares=shares, staleness=staleness, grown_from=8),
    )


def main() -> None:
    """Print the tables, and how fast the scheduling classes were at the largest size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerators", default="8,64,512,4096,10000")
    parser.add_argument("--vary-at", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    console = Console()
    console.print(COSTS, LEGEND)
    largest = None
    start = time.process_time()
    for number in map(int, options.accelerators.split(",")):
        runs = scaled(workload(1.0, options.steps), [number], shares=[0.25], staleness=[0, 1, 2, 4])
        console.print(table_of(runs, None))
        largest = runs[-1].result
    varied = [(sigma, RESPONSES_PER_ACCELERATOR) for sigma in (0.0, 0.5, 1.0, 1.5)]
    for sigma, responses in [*varied, *((1.0, responses) for responses in (4, 64, 256))]:
        console.print(f"sigma {sigma:g}, {responses} responses per accelerator")
        work = workload(sigma, 2 * options.steps, responses)
        console.print(table_of(scaled(work, [options.vary_at], shares=[0.125, 0.25, 0.375], staleness=[0, 1, 4]), None))
    if largest is not None:
        print(f"decisions at {largest.setting.accelerators} accelerators, k = {largest.setting.max_staleness}:")
        for who, count in sorted(largest.decisions.calls.items()):
            print(f"  {who}: {count:,} in {largest.decisions.seconds[who]:.3f} s")
    print(f"{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
