"""What a port costs at the true sizes of models, weights random: a swap, a token, a hundred plugs.

python benchmarks/port.py [--sizes 512 1024 TinyLlama] [--tokens 8]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench import alone, command, setting
from scale import TINYLLAMA, like_tinyllama, memory, random_model

from chassis_utils import Adapter, Features, LanguageModel, Port, load
from porting import overhead, swap

SIZES = ("512", "1024", "TinyLlama")
PLUGS = 100


def drawn(base: LanguageModel, rank: int, edit_rank: int | None = None) -> Adapter:
    """An adapter with random numbers in the form of the final-layer fit, or with edits in that of v2."""
    draw = torch.Generator().manual_seed(rank)

    def one(m: int, rank: int, layer: int, places: tuple, **kind: object) -> Adapter:
        features = Features(places)
        shapes = (sum(features.sizes(base)), rank), (rank, m), (m,)
        # So small that every text is as long as the bare base's.
        maps = (torch.randn(*shape, generator=draw) * 1e-6 for shape in shapes)
        return Adapter("drawn", layer, *maps, base.name, base.head_hash, features=features, **kind)

    final, edits = base.num_layers, ()
    if edit_rank is None:
        return one(base.vocab_size, rank, final, (final,))
    for before, number in pairwise((*range(final), "stream")):
        onto = ("layer", number) if number != "stream" else ("stream", final)
        places = (before, f"block {before}")
        edits += (one(base.hidden_size, edit_rank, onto[1], places, space="hidden", onto=onto[0]),)
    return one(base.vocab_size, rank, final, (final, final - 1, f"block {final - 1}"), edits=edits)


def kinds(base: LanguageModel) -> Iterator[tuple[str, Adapter]]:
    """Plugs from the cheapest to v2 as it is fitted, nothing cut."""
    yield "final layer, rank 16", drawn(base, 16)
    yield "final layer, rank 64", drawn(base, 64)
    yield "v2, edits and map of rank 16", drawn(base, 16, 16)
    yield "v2, edits and map of rank 64", drawn(base, 64, 64)
    yield "v2, nothing cut", drawn(base, 2 * base.hidden_size, base.hidden_size)


def costs(size: str, tokens: int) -> None:
    """Print a base's numbers, and of every plug its numbers, its overhead a token, and what a swap takes."""
    shape = TINYLLAMA if size == "TinyLlama" else like_tinyllama(int(size))
    base = random_model(shape)
    port, prompt = Port(base), " ".join(f"w{i}" for i in range(16))
    for name, adapter in kinds(base):
        port.plug(name, adapter)
    shares = overhead(port, prompt, {"bare": {}} | {name: {name: 1.0} for name in port.plugs}, tokens)
    own = sum(one.numel() for one in base.model.parameters())
    print(f"{shape}: {own:,} numbers")
    for name, plug in [*port.plugs.items()]:
        port.plug(alike := f"{name}, again", plug)
        like, bare = (f"{1e3 * swap(port, name, other):.3f} ms" for other in (alike, None))
        numbers = f"{plug.num_parameters:,} ({plug.num_parameters / own:.2%})"
        swaps = f"a swap with its like {like}, with the base {bare}"
        print(f"  {name}: {numbers}, {shares[name] - 1:+.1%} a token, {swaps}", flush=True)


def resident(folder: str) -> tuple[int, int]:
    """Bytes of one adapter's numbers, and what a hundred of it add to a process, each read from its folder.

    Beside twenty that were plugged in before: the first ones make a process ready.
    """
    base = load("pocket-base", device="cpu")
    port, first = Port(base), Adapter.load(folder, base)
    one = sum(t.numel() * t.element_size() for t in (first.down, first.up, first.bias))
    held = []
    for number in range(20 + PLUGS):
        port.plug(f"{number}", folder)
        held.append(memory("VmRSS"))
    return one, held[-1] - held[19]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="widths of two blocks, or TinyLlama")
    parser.add_argument("--tokens", type=int, default=8, help="of each text that is timed")
    args = parser.parse_args()
    print(setting())
    with TemporaryDirectory() as folder:
        place = drawn(load("pocket-base", device="cpu"), 256).save(Path(folder) / "adapter")
        ((one, hundred),) = alone(resident, [(str(place),)])
    print(f"{PLUGS} plugs of {one / 1e6:.2f} MB: {hundred / PLUGS / one:.3f} times the numbers of each")
    for size in args.sizes:
        alone(partial(costs, size, args.tokens), [()])


if __name__ == "__main__":
    command(main)
