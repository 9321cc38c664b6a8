"""The router on the corpora that the pocket models come from: fitted on bundled text, judged on theirs.

python benchmarks/routing.py --corpora DIR [--split val] [--tokens 40000]
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path

import torch
from bench import command, quotients, setting, show, timed
from corpora import text

from chassis_utils import LanguageModel, Probes, load, probe_set
from porting import by_length
from routes import Router, confusion

PACKAGE = Path(__file__).parents[1] / "chassis_utils"
DOMAINS = {"pocket-math": "math", "pocket-shakespeare": "verse", None: "prose"}

#: Of the languages, the router is fitted on German, Spanish and Chinese templates alone.
LANGUAGES = (
    "Le vieux pont de pierre traverse la rivière depuis trois siècles, et au printemps l'eau monte jusqu'aux arches.",
    "La mattina presto il fornaio apre la bottega, accende il forno e prepara il pane per tutta la strada.",
    "In de winter vriest het meer dicht, en dan schaatsen de kinderen uit het dorp van de ene oever naar de andere.",
    "No fim da tarde os pescadores voltam ao porto, contam os peixes e vendem tudo antes de a noite cair.",
    "På hösten faller löven från träden, och den gamla vägen genom skogen blir alldeles gul och röd.",
    "Flumen latum per agros fluit, et in ripa eius oppidum parvum iacet, ubi mercatores saepe conveniunt.",
    "Stary zegar na wieży wybija godziny od dwustu lat, a w mieście nikt już nie nosi własnego zegarka.",
    "Köyn lapset kävelevät kouluun metsän läpi, ja talvella heillä on taskulamput, sillä aamulla on pimeää.",
    "Yaşlı balıkçı her sabah denize açılır, ağlarını toplar ve öğleden önce limana geri döner.",
    "Старый мост через реку построили триста лет назад, и каждую весну вода поднимается до самых арок.",
    "Το παλιό καράβι έφτασε στο λιμάνι το πρωί, και οι ναύτες κατέβασαν τα κιβώτια με τα πορτοκάλια.",
    "古い橋は三百年前に石で造られ、春になると川の水が橋のすぐ下まで上がってくる。",
)


def fitted(base: LanguageModel) -> Router:
    """A router for the two pocket experts, of bundled text alone."""
    experts = {"pocket-math": probe_set("math-text"), "pocket-shakespeare": probe_set("verse")}
    rest = [probe_set("prose"), *(probe_set(name, n=64) for name in ("numerals", "languages"))]
    return Router.fit(base, experts, rest)


def unseen(base: LanguageModel, n: int = 64) -> dict[str, Probes]:
    """Texts of no expert, of kinds that the router is not fitted on."""
    draw, files = random.Random(0), sorted(PACKAGE.glob("*.py"))
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    starts = [source.index("\n", draw.randrange(len(source) - 1000)) + 1 for _ in range(n)]
    letters = "abcdefghijklmnopqrstuvwxyz      "
    found = {
        "code": [source[start : start + 500] for start in starts],
        "other languages": list(LANGUAGES),
        "random letters": ["".join(draw.choices(letters, k=150)) for _ in range(n)],
        "lists of numbers": [
            ", ".join(str(draw.randrange(10 ** draw.randint(1, 5))) for _ in range(40)) for _ in range(n)
        ],
        "random tokens": [base.tokenizer.decode(draw.sample(range(3, base.vocab_size), 60)) for _ in range(n)],
        "other questions": list(probe_set("unseen", "test", n).prompts),
    }
    return {name: Probes(name, "text", tuple(texts)) for name, texts in found.items()}


def cut(base: LanguageModel, probes: Probes, length: int) -> Probes:
    """The first tokens of every prompt that has more of them."""
    ids = (base.tokenizer(prompt, verbose=False)["input_ids"][1:] for prompt in probes.prompts)
    texts = dict.fromkeys(base.tokenizer.decode(one[:length]) for one in ids if len(one) > length)
    return Probes(probes.name, probes.split, tuple(one for one in texts if one.strip()))


def cost(router: Router, probes: Probes) -> dict[str, list[float]]:
    """CPU time of routing prompts one by one over that of one bare pass with head over each."""
    base, found = router.base, {}
    for length in (16, 64, None):
        given = cut(base, probes, length) if length else probes
        ids = [base.tokenizer(prompt, return_tensors="pt") for prompt in given.prompts[:32]]

        def passes(ids: list = ids) -> None:
            with torch.inference_mode():
                for one in ids:
                    base.model(**one, use_cache=False)

        parts = {"route": partial(lambda given: [router([one]) for one in given.prompts[:32]], given), "pass": passes}
        name = f"one route / one forward pass, {f'{length} tokens' if length else 'whole passages'}"
        found[name] = quotients(timed(parts, time.process_time), "route", ["pass"])["route / pass"]
    return found


def main() -> None:
    """Fit, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="of the corpora")
    parser.add_argument("--tokens", type=int, default=40_000, help="of each domain to judge on")
    args = parser.parse_args()
    base = load("pocket-base", device="cpu")
    router = fitted(base)
    sets = {name: text(base, args.corpora, domain, args.split, args.tokens) for name, domain in DOMAINS.items()}
    print(confusion(router, sets).to_string(), end="\n\n")
    inside = {probes.name: (name, probes) for name, probes in sets.items()}
    outside = {name: (None, probes) for name, probes in unseen(base).items()}
    for title, several in (("right, by tokens read", inside), ("left to the bare base, by tokens read", outside)):
        print(title, by_length(router, several).to_string(float_format="{:.3f}".format), sep="\n", end="\n\n")
    show(setting(), cost(router, sets["pocket-math"]))


if __name__ == "__main__":
    command(main)
