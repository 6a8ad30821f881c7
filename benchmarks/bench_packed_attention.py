"""Packed attention, forward and forward + backward, beside PyTorch's scaled_dot_product_attention on the same processor.

| batch    | ours                                   | PyTorch's                                                         |
|----------|----------------------------------------|-------------------------------------------------------------------|
| 4x512    | 4 segments of 512 in one call          | is_causal, a batch of 4                                           |
| packed   | 4 rows of 512 holding about 8 segments | one dense block mask per row, as a model with packed rows uses it |
| 34x60    | 34 segments of 60                      | is_causal, a batch of 34: no packing, the best case for it        |
| 1x2048   | one segment                            | is_causal                                                         |

Each arm runs in turn with the others; the least processor time of all threads and the median wall time over the rounds are kept.
`gflops` counts the products below the diagonal only, 2 in the forward and 5 in the backward.

    python -m benchmarks.bench_packed_attention [--threads 2] [--rounds 9] [--smoke]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import record
from halfbyte.kernels.packed_attention import packed_attention

HEADS, GROUPS, DIM = 9, 3, 64  # SmolLM2-135M
MIXED = (30, 95, 44, 60, 71, 38, 102, 72)  # 512 tokens of documents as e2e_nlg has them
BATCHES = {"4x512": [512] * 4, "packed": list(MIXED) * 4, "34x60": [60] * 34, "1x2048": [2048]}
DTYPES = (torch.bfloat16, torch.float32)


def arms(batch: str, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]]:
    """Name -> (forward, inputs with gradients, gradient of the output)."""
    torch.manual_seed(0)
    lengths = BATCHES[batch]
    tokens = sum(lengths)
    q, do = (torch.randn(tokens, HEADS, DIM).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, GROUPS, DIM).to(dtype) for _ in range(2))
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    starts = torch.tensor(edges, dtype=torch.int32)
    flat = [x.clone().requires_grad_() for x in (q, k, v)]
    width = 512 if batch == "packed" else lengths[0]
    rows = [x.view(tokens // width, width, -1, DIM).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    q_BHTD, k_BGTD, v_BGTD = rows
    mask = None
    if batch == "packed":
        segment = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)]).view(-1, 1, width)
        mask = (segment.transpose(1, 2) == segment).tril()[:, None]

    def theirs() -> Tensor:
        return scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    return {
        "halfbyte": (lambda: packed_attention(flat[0], flat[1], flat[2], starts, DIM**-0.5), flat, do),
        "sdpa": (theirs, rows, do.view(tokens // width, width, -1, DIM).transpose(1, 2)),
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def compare(batch: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Times of both arms and their ratios; the outputs must agree first."""
    made = arms(batch, dtype)
    ours, theirs = (made[name][0]().detach() for name in ("halfbyte", "sdpa"))
    torch.testing.assert_close(ours, theirs.transpose(1, 2).reshape(ours.shape), rtol=0.02, atol=0.02)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"forward": [], "step": []} for name in made}
    for _ in range(rounds + 1):
        for name, (forward, inputs, upstream) in made.items():
            with torch.no_grad():
                times[name]["forward"].append(_timed(forward))

            def step(forward: Callable[[], Tensor] = forward, inputs: list[Tensor] = inputs, upstream: Tensor = upstream) -> object:
                return torch.autograd.grad(forward(), inputs, upstream)

            times[name]["step"].append(_timed(step))
    products = sum(length * length for length in BATCHES[batch]) * HEADS * DIM * 1e-6
    result: dict[str, object] = {"batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    for name, parts in times.items():
        for part, seen in parts.items():
            wall, processor = statistics.median(one[0] for one in seen[1:]), min(one[1] for one in seen[1:])
            result[f"{name}_{part}_ms"], result[f"{name}_{part}_processor_ms"] = round(wall, 3), round(processor, 3)
            result[f"{name}_{part}_gflops"] = round(products * (2 if part == "forward" else 7) / wall, 1)
    for part in ("forward", "step"):
        for kind in ("ms", "processor_ms"):
            ratio = float(str(result[f"sdpa_{part}_{kind}"])) / float(str(result[f"halfbyte_{part}_{kind}"]))
            result[f"{part}_times_faster_{kind}"] = round(ratio, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one round, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for batch in BATCHES:
        for dtype in DTYPES:
            row = compare(batch, dtype, 1 if options.smoke else options.rounds)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if not options.smoke:
        print(record.write("packed_attention", {"threads": options.threads, "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
