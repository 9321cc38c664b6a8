"""The port as a page one talks to: plugs, weights and a prompt; what is likely next, and texts side by side."""

from __future__ import annotations

import html
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from chassis_utils import Adapter, ChassisError, LanguageModel, Port, fit, harvest, load, probe_set
from chassis_utils.tokens import token_bytes
from plots import GREY, PALETTE, style, template
from routes import Router

#: Plugs that are there without a folder: name -> (expert, bundled text of its domain).
DOMAINS = {"math": ("pocket-math", "math-text"), "shakespeare": ("pocket-shakespeare", "verse")}
BASES = ("pocket-base", "pocket-math", "pocket-shakespeare")
REST = {"prose": 24, "numerals": 32, "languages": 32}  # texts of no expert, for the router
# With every choice searched for, twelve passages take twice as long; this lam was the best on passages of split val.
QUICK = {"n": 12, "lam": 0.1}
PROMPT = "Question: Tom has 12 apples and buys 7 more. How many apples does he have?\nAnswer:"
SEEN = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})  # what a label would not show
BARE, ADAPTED = "bare base", "port"  # speakers, of which no plug may have the name
STYLE = Path(__file__).with_name("app") / "port.css"


def check_names(plugs: Iterable[str]) -> None:
    """ChassisError for a plug that has the name of a speaker."""
    if reserved := {BARE, ADAPTED} & {*plugs}:
        raise ChassisError(f"no plug may be named '{min(reserved)}', as a speaker of the page is: choose another name")


def colour(name: str, names: list[str]) -> str:
    """Of the bare base, the port, or an expert, the same in bars and texts."""
    own = {BARE: GREY, ADAPTED: style("v2")[1]}
    spare = [one for one in PALETTE if one not in own.values()]
    return own.get(name) or spare[[one for one in names if one not in own].index(name) % len(spare)]


def label(token: int, tokenizer: Any) -> str:
    """A token's text, with the space that it begins with; of one that stands for none (an end of text), its name."""
    text = (_pieces(tokenizer)[token] or b"").decode(errors="replace")
    return (text or str(tokenizer.convert_ids_to_tokens(token))).translate(SEEN)


#: The bytes of a whole vocabulary, for which a label asks whenever it is drawn; a page has one tokenizer.
_pieces = lru_cache(maxsize=2)(token_bytes)


def next_tokens(said: Mapping[str, torch.Tensor], tokenizer: Any, tokens: int = 8) -> go.Figure:
    """Bars of the likeliest next tokens, one group a token, one bar a speaker.

    Args:
        said: speaker -> probabilities `(vocab,)`; all over the vocabulary of `tokenizer`.
        tokenizer: tells the tokens' texts, which are drawn as they are, not as markup.
        tokens: how many are drawn: those that any speaker holds likeliest.
    """
    chosen = torch.stack([*said.values()]).amax(0).topk(tokens).indices
    pieces = [label(i, tokenizer) for i in chosen.tolist()]
    labels, names = [html.escape(piece, quote=False) for piece in pieces], [*said]
    figure = go.Figure(layout={"barmode": "group", "bargap": 0.28, "bargroupgap": 0.08, "height": 440})
    for name, probabilities in said.items():
        figure.add_bar(
            x=probabilities[chosen].tolist(), y=[*range(tokens)], orientation="h", customdata=labels,
            name=html.escape(name, quote=False), marker={"color": colour(name, names), "line": {"width": 0}},
            hovertemplate="<b>%{customdata}</b><br>%{fullData.name} %{x:.1%}<extra></extra>")  # fmt: skip
    ticks = {"tickvals": [*range(tokens)], "ticktext": labels, "range": [tokens - 0.5, -0.5], "showgrid": False}
    return figure.update_layout(
        template=template, yaxis=ticks | {"tickfont": {"size": 13, "family": "ui-monospace, monospace"}},
        xaxis={"tickformat": ".0%", "rangemode": "tozero"}, margin={"l": 64, "r": 16, "t": 44, "b": 32},
        legend={"y": 1, "yanchor": "top", "traceorder": "normal"}, meta={"alt": "the likeliest next tokens"},
    )  # fmt: skip


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Nats from `q` to `p`, both `(vocab,)`."""
    p, q = p.double().clamp(min=1e-30), q.double().clamp(min=1e-30)
    return float((p * (p / q).log()).sum())


def plain(text: str, kind: str = "", role: str = "") -> str:
    """A text as HTML that shows every character of it: what a model writes is never markup."""
    spoken = f' role="{role}"' if role else ""
    return f'<div class="{kind}"{spoken}>{html.escape(text)}</div>'


class PortApp(widgets.VBox):
    """Controls, figure and texts around a port; what `plugs` hold is plugged into ports of its own.

    `experts` are models with the base's tokenizer that are shown beside the port, by the name of their plug.
    """

    def __init__(
        self, base: LanguageModel, plugs: Mapping[str, Adapter | str], experts: Mapping[str, LanguageModel],
        router: Router | None = None, prompt: str = PROMPT,
    ) -> None:  # fmt: skip
        check_names(plugs)
        # A port that writes refuses changes: the figure has ports of its own, which share every weight with these.
        self.looks, self.pens = ({n: Port(m) for n, m in {BARE: base, **experts, ADAPTED: base}.items()} for _ in "12")
        for port in (self.looks[ADAPTED], self.pens[ADAPTED]):
            port.router = router
            for name, plug in plugs.items():
                port.plug(name, plug)
        self.base, self.writer, self.leave = base, None, threading.Event()
        self.prompt = widgets.Textarea(prompt, description="Prompt", continuous_update=False, rows=4)
        first = next(iter(plugs), None)  # alone: two at full weight say neither's text well
        self.checks = {name: widgets.Checkbox(name == first, description=name, indent=False) for name in plugs}
        weight = {"min": 0.0, "max": 2.0, "step": 0.05, "readout_format": ".2f", "continuous_update": False}
        self.weights = {name: widgets.FloatSlider(1.0, tooltip=f"weight of {name}", **weight) for name in plugs}
        self.tokens = widgets.IntSlider(96, 8, 256, 8, description="Tokens", continuous_update=False)
        tips = {"Route": "use the plug that the prompt is for", "Write": "let all write on", "Stop": "end the texts"}
        buttons = (widgets.Button(description=name, tooltip=tip) for name, tip in tips.items())
        self.route, self.write, self.stop = buttons
        self.write.button_style, self.stop.disabled, self.route.disabled = "primary", True, router is None
        self.choice, self.error, self.apart = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.figure, self.panels = widgets.Output(), {name: widgets.HTML() for name in self.pens}
        for one in (self.prompt, *self.checks.values(), *self.weights.values()):
            one.observe(lambda _: self.draw(), "value")
        self.prompt.observe(lambda _: self.another(), "value")
        self.route.on_click(lambda _: self.routed())
        self.write.on_click(lambda _: self.written())
        self.stop.on_click(lambda _: self.leave.set())
        super().__init__([self.controls(), self.texts()])
        self.add_class("chassis-port")
        self.draw()

    def controls(self) -> widgets.Widget:
        """What is set on the left, what follows from it on the right."""
        heads = [widgets.HTML(f"<h2>{head}</h2>") for head in ("Prompt", "Plugs and weights", "Text", "Likely next")]
        rows = [_box("plug", self.checks[name], self.weights[name]) for name in self.checks]
        plugs = _box("part", heads[1], *rows, _box("row", self.route, self.choice))
        text = _box("part", heads[2], _box("row", self.tokens, self.write, self.stop))
        left = _box("left", _box("part", heads[0], self.prompt), plugs, text, self.error)
        return _box("top", left, _box("right", heads[3], self.figure, self.apart))

    def texts(self) -> widgets.Widget:
        """One panel a speaker."""
        self._show(dict.fromkeys(self.panels, ""))
        colours = {name: colour(name, [*self.pens]) for name in self.panels}
        titles = {n: f'<h3 style="--speaker: {hue}">{html.escape(n)}</h3>' for n, hue in colours.items()}
        return _box("panels", *(_box("panel", widgets.HTML(titles[n]), text) for n, text in self.panels.items()))

    def another(self) -> None:
        """Forget what was said of another prompt."""
        self.choice.value = ""
        if not (self.writer and self.writer.is_alive()):
            self._show(dict.fromkeys(self.panels, ""))

    @property
    def in_use(self) -> dict[str, float] | None:
        """Weights of the plugs that are ticked; None where that leaves the bare base."""
        chosen = {name: self.weights[name].value for name, check in self.checks.items() if check.value}
        return {name: weight for name, weight in chosen.items() if weight} or None

    def told(self, error: ChassisError | None = None) -> None:
        """Show what was wrong, in a line, or nothing."""
        self.error.value = plain(str(error), "error", "alert") if error else ""

    def draw(self) -> None:
        """The figure for what is set now."""
        try:
            self.looks[ADAPTED].use(self.in_use)
            said = {name: port.probabilities([self.prompt.value])[0].cpu() for name, port in self.looks.items()}
        except ChassisError as error:
            return self.told(error)
        figure = next_tokens(said, self.base.tokenizer).to_plotly_json()
        data = {"application/vnd.plotly.v1+json": figure | {"config": {"responsive": True}}}
        self.figure.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        first = {name: label(int(p.argmax()), self.base.tokenizer) for name, p in said.items()}
        lines = ["likeliest: " + ", ".join(f"{name} {first[name]} {float(p.max()):.0%}" for name, p in said.items())]
        lines += [f"KL to {name}: {BARE} {kl(own, said[BARE]):.2f}, {ADAPTED} {kl(own, said[ADAPTED]):.2f} nats"
                 for name, own in said.items() if name not in (BARE, ADAPTED)]  # fmt: skip
        self.apart.value = plain("\n".join(lines), "note")
        self.told()

    def routed(self) -> None:
        """Tick what the router takes the prompt for, at weight 1, or nothing."""
        port = self.looks[ADAPTED]
        try:
            row = port.router([self.prompt.value]).iloc[0]
        except ChassisError as error:
            return self.told(error)
        name = row["choice"] or "none"
        where = f"{row[name]:.1%} sure, {row['distance']:.2f} of the limit from what is known"
        self.choice.value = plain(f"{row['choice'] or BARE}: {where}", "note", "status")
        for other, check in self.checks.items():
            check.value = other == name
        if name in self.weights:
            self.weights[name].value = 1.0

    def written(self) -> None:
        """Let every speaker write, in a thread, until all have ended or are stopped; one such thread at a time."""
        if self.writer and self.writer.is_alive():
            return
        self.leave.clear()
        self.writer = threading.Thread(target=self._write, daemon=True)
        self.write.disabled, self.stop.disabled = True, False
        self.writer.start()

    def _write(self) -> None:
        streams: dict[str, Iterator[str]] = {}
        texts, shown = dict.fromkeys(self.pens, ""), time.monotonic()
        self.told()
        try:
            self.pens[ADAPTED].use(self.in_use)
            for name, port in self.pens.items():
                streams[name] = port.generate(self.prompt.value, stream=True, max_new_tokens=self.tokens.value)
            running = dict(streams)
            while running and not self.leave.is_set():
                for name, stream in [*running.items()]:
                    piece = next(stream, None)
                    if piece is None:
                        del running[name]
                    texts[name] += piece or ""
                if time.monotonic() - shown > 0.1 or not running:  # a page need not be told of every token
                    self._show(texts)
                    shown = time.monotonic()
        except ChassisError as error:
            self.told(error)
        finally:
            for stream in streams.values():
                stream.close()
            self._show(texts)
            self.write.disabled, self.stop.disabled = False, True

    def _show(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self.panels[name].value = plain(text.lstrip(" "), "text")

    def close(self) -> None:
        """End what is being written, then go."""
        self.leave.set()
        if self.writer:
            self.writer.join()
        super().close()


def quickly(base: LanguageModel, say: Any = print) -> tuple[dict, dict, Router]:
    """Adapters for the experts of `DOMAINS` that are not the base, the experts, and a router: from few passages."""
    experts = {name: load(expert) for name, (expert, _) in DOMAINS.items() if expert != base.name}
    plugs = {}
    for name, expert in experts.items():
        say(f"fitting an adapter for {expert.name} ({len(plugs) + 1} of {len(experts)})")
        plugs[name] = kept(base, expert, DOMAINS[name][1])
    say("fitting the router")
    return plugs, experts, known(base, {name: expert.name for name, expert in experts.items()})


def kept(base: LanguageModel, expert: LanguageModel, text: str) -> Adapter:
    """An adapter fitted on a few passages; where a server keeps them, the one that an earlier page fitted."""
    store = os.environ.get("CHASSIS_KEPT")
    folder = Path(store, f"{base.revision}-{expert.revision}") if store else None
    if folder and folder.is_dir():
        return Adapter.load(folder, base)
    passages = probe_set(text, n=QUICK["n"])
    adapter = fit(harvest(base, expert, passages, "all", progress=False), lam=QUICK["lam"])
    if folder:
        adapter.save(folder)  # there whole or not at all
    return adapter


def known(base: LanguageModel, experts: Mapping[str, str | None]) -> Router | None:
    """A router for the plugs, by name, whose expert's domain is bundled; None where there is none."""
    texts = dict(DOMAINS.values())
    sets = {name: probe_set(texts[expert], n=24) for name, expert in experts.items() if expert in texts}
    return Router.fit(base, sets, [probe_set(name, n=n) for name, n in REST.items()]) if sets else None


def folders(base: LanguageModel, plugs: Mapping[str, str]) -> tuple[dict, dict, Router | None]:
    """Adapters from folders; of their experts, those that are bundled and have the base's tokenizer."""
    found = {name: Adapter.load(folder, base) for name, folder in plugs.items()}
    names = {name: adapter.info.get("expert") for name, adapter in found.items()}
    experts = {name: load(expert) for name, expert in names.items() if expert in BASES}
    return found, experts, known(base, names)


def app(base: str = BASES[0], plugs: Mapping[str, str] | None = None) -> widgets.Widget:
    """The page: a choice of base, and a `PortApp` for it, which is made in a thread while the page says how far it is.

    `base` is what `load` takes, `plugs` are folders of adapters by name; without, those of `DOMAINS` are fitted.
    """
    # An adapter belongs to one base: with adapters given, there is nothing to choose.
    bases = [base] if plugs else [*dict.fromkeys([base, *BASES])]
    choice = widgets.Dropdown(options=bases, value=base, description="Base")
    title = "<h1>The port</h1><p>A base model that stays as it is, and experts plugged into it by weight. " \
            "Write a prompt, move the weights, and see what each would say.</p>"  # fmt: skip
    progress, space = widgets.HTML(), widgets.VBox()

    def make(name: str) -> None:
        try:
            prompt = next((old.prompt.value for old in space.children), PROMPT)
            for old in space.children:
                old.close()
            space.children = ()
            progress.value = plain(f"loading {name} …", "note", "status")
            model = load(name)
            say = lambda text: setattr(progress, "value", plain(f"{text} …", "note", "status"))  # noqa: E731
            parts = folders(model, plugs) if plugs else quickly(model, say)
            space.children = (PortApp(model, *parts, prompt),)
            progress.value = ""
        except ChassisError as error:
            progress.value = plain(str(error), "error", "alert")
        finally:
            choice.disabled = False

    def begin(_: Any = None) -> None:
        choice.disabled = True
        threading.Thread(target=make, args=(choice.value,), daemon=True).start()

    choice.observe(begin, "value")
    begin()
    look = widgets.HTML(f"<style>{STYLE.read_text(encoding='utf-8')}</style>")
    page = widgets.VBox([look, widgets.HTML(title), choice, progress, space])
    page.add_class("chassis-page")
    return page


def _box(kind: str, *children: widgets.Widget) -> widgets.Box:
    box = widgets.Box(children)
    return box.add_class(f"chassis-{kind}")
