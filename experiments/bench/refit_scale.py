"""What a refit of a layer's columns costs at the size of real layers: one synthetic layer.

    python experiments/bench/refit_scale.py --units 2816 --hidden 512 --tokens 6400
    python experiments/bench/refit_scale.py

By default 11264 hidden units (64 experts of DeepSeekMoE-16B condensed to six and two shared ones)
beside a hidden state of 2048, from 25600 tokens of which a tenth chooses the ridge, in single
precision. The units are those of a random gated MLP, with scales over several decades. Told: how
fast this machine multiplies matrices; the products alone (hidden units, Gram and cross matrix: what
nothing can do without), measured and at that rate; all of the refit, with the choice of its ridge;
and the memory beyond the weights. The forward pass that gives targets is not in it. Times are CPU
time of all threads, so that they say the same where others use the machine too.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import silu

from moe_lab.methods.least_squares import Fit, NormalEquations, TokenRows, fitted
from moe_lab.methods.ridge import RIDGES
from moe_lab.progress import duration

CHUNK = 1024  # tokens at once


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    asked = parsed(arguments)
    torch.set_num_threads(asked.threads)
    layer = Layer(asked.units, asked.hidden)
    held = max(asked.tokens // 10, 1)
    rate = matrix_rate()
    print(
        f"{asked.units} hidden units, hidden size {asked.hidden}, {asked.tokens} tokens of which "
        f"{held} choose among {len(RIDGES)} ridges; {asked.threads} threads, float32, CPU time"
    )
    print(f"matrix products of this machine: {rate / 1e9:.1f} GFLOP/s for each second of CPU time")
    before, started = peak_gib(), time.process_time()
    fit = refit(layer, asked.tokens - held, held)
    whole, memory = time.process_time() - started, peak_gib() - before
    products = time_of_products(layer, asked.tokens)
    tell(layer, asked.tokens, rate, products, whole)
    print(
        f"memory beyond the weights, at its highest: {memory:.2f} GiB; a Gram matrix "
        f"is {4 * asked.units**2 / 2**30:.2f} GiB"
    )
    print(
        f"chosen: strength {fit.ridge.strength:g}, scale {fit.ridge.scale}; relative error held "
        f"out {fit.held_error:.4f} (of the prior {fit.prior_error:.4f}), on all {fit.error:.4f}"
    )
    return 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--units", type=int, default=11264, help="hidden units of the layer")
    parser.add_argument("--hidden", type=int, default=2048, help="size of the hidden state")
    parser.add_argument("--tokens", type=int, default=25600)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


class Layer:
    """A random gated MLP, whose units and tokens differ in scale by decades, and what it misses.

    Targets are what an eighth of the units give with other columns than the prior's, and noise.
    """

    def __init__(self, units: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.gate_ND = torch.randn(units, size, generator=generator) / size**0.5
        self.up_ND = torch.randn(units, size, generator=generator) / size**0.5
        self.scale_N = torch.exp(1.5 * torch.randn(units, generator=generator))
        self.prior_ND = torch.randn(units, size, generator=generator) / units**0.5
        self.true_MD = self.prior_ND[: units // 8] + self.prior_ND[units // 8 : units // 8 * 2]
        self.prior_ND[units // 8 :] = 0
        self.shape, self.size = (units, size), size

    def rows(self, first: int, number: int) -> Iterator[TokenRows]:
        """So many tokens from the first on, a chunk at a time: the same whenever asked."""
        for start in range(first, first + number, CHUNK):
            tokens = min(CHUNK, first + number - start)
            generator = torch.Generator().manual_seed(1 + start)
            x_TD = torch.randn(tokens, self.size, generator=generator)
            z_TN = silu(x_TD @ self.gate_ND.T).mul_(x_TD @ self.up_ND.T).mul_(self.scale_N)
            y_TD = 10 * torch.randn(tokens, self.size, generator=generator)
            y_TD += z_TN[:, : self.true_MD.shape[0]] @ self.true_MD
            yield TokenRows(z_TN, y_TD, 1 / y_TD.square().mean(dim=1))


def time_of_products(layer: Layer, tokens: int) -> float:
    """Seconds of hidden units, Gram and cross matrix of all tokens."""
    equations, started = NormalEquations(*layer.shape), time.process_time()
    for rows in layer.rows(0, tokens):
        equations.add(rows)
    return time.process_time() - started


def refit(layer: Layer, first: int, held: int) -> Fit:
    """All of it: sums, every ridge on the held-out tokens, these added, solved for all outputs."""
    equations = NormalEquations(*layer.shape)
    for rows in layer.rows(0, first):
        equations.add(rows)
    return fitted(equations, lambda: layer.rows(first, held), layer.prior_ND)


def matrix_rate(size: int = 3000, times: int = 3) -> float:
    """Operations a second of CPU time, of a product of square matrices: the best of some tries."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(times):
        started = time.process_time()
        torch.mm(left, right)
        seconds.append(time.process_time() - started)
    return 2 * size**3 / min(seconds)


def tell(layer: Layer, tokens: int, rate: float, products: float, whole: float) -> None:
    """One line each, and how many times the products the whole is."""
    units, size = layer.shape
    operations = 2 * tokens * units * (2 * size + units + size)  # hidden units, Gram, cross
    ideal = operations / rate
    print(f"products alone, at that rate   {duration(ideal):>10}")
    print(f"products alone, measured       {duration(products):>10}   {products / ideal:.2f}")
    print(f"the whole refit                {duration(whole):>10}   {whole / ideal:.2f}")
    print(
        f"the whole refit is {whole / products:.2f} times its products as measured (half of the "
        "symmetric Gram matrix)"
    )


def peak_gib() -> float:
    """The most memory that the process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
