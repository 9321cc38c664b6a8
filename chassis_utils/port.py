"""The port: one frozen base, and experts that are plugged in, swapped, mixed and generated with."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from pathlib import Path
from queue import Queue
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process as warpers
from transformers.generation.streamers import BaseStreamer

from .activations import padded
from .adapter import Adapter
from .bridge import Bridge, Bridged
from .errors import ChassisError
from .exchange import refusing
from .models import LanguageModel, Place


@runtime_checkable
class Bridging(Protocol):
    """A live expert of any other kind, such as one behind an API."""

    def bridged(self, base: LanguageModel, prompts: Sequence[str], progress: bool = True) -> Bridged:
        """What it says behind each of n prompts, in the base's vocabulary."""


Live = LanguageModel | Bridge | Bridging  #: An expert that runs beside the base and is asked at every token
Plug = Adapter | Live
TAIL = 8  # tokens that others are decoded behind, when a stop string is looked for: a first space depends on them
#: Settings of `transformers`' generate that are the port's own, or of which texts come out that it cannot tell apart.
OWN = {*"inputs input_ids inputs_embeds attention_mask streamer stopping_criteria eta_cutoff past_key_values".split()}
OWN |= {*"num_return_sequences return_dict_in_generate generation_config custom_generate assistant_model".split()}
_WARPERS = {"temperature": warpers.TemperatureLogitsWarper, "top_k": warpers.TopKLogitsWarper}
_WARPERS |= {"top_p": warpers.TopPLogitsWarper, "min_p": warpers.MinPLogitsWarper}
_WARPERS |= {"typical_p": warpers.TypicalLogitsWarper, "epsilon_cutoff": warpers.EpsilonLogitsWarper}


@dataclass(frozen=True)
class _Weighted:
    """A weight times an adapter, without a copy of it."""

    adapter: Adapter
    weight: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def correction(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        return self.weight * self.adapter.correction(hidden)


class Port:
    """A base that is loaded once and never changed, and what is plugged into it.

    `model` is the base as `transformers` knows it, with the adapters in use at work in every pass: its own `generate`,
    streamers and pipelines do as ever, in one thread at a time. It shares every weight with the base, whose own passes
    stay bare; what moves or trains the one does so to the other. What is in use adds up: the logits are the base's,
    plus for each plug `weight * strength * (what it says - what the base says)`. Of an adapter that is its correction
    (with edits on the way, the edits are weighted); of a live expert the difference of log probabilities, what a bridge
    could not place being left to the base. Live experts are heard in `generate` (of the port or its `model`, after
    penalties for repetition) and `probabilities`; a call of `model` itself has no text.
    """

    def __init__(self, base: LanguageModel, router: Callable[[Sequence[str]], pd.DataFrame] | None = None) -> None:
        if not isinstance(base, LanguageModel) or base.edits:
            why = "has edits already" if isinstance(base, LanguageModel) else "is no model"
            raise ChassisError(f"{getattr(base, 'name', base)!s:.80} {why}: load the bare model, and plug in the rest")
        self.base, self.router = base, router
        self.plugs: dict[str, Plug] = {}
        self._strengths, self._weights = dict[str, float](), dict[str, float]()
        self._busy, self._passing, self._hooks = threading.Lock(), threading.RLock(), ExitStack()
        self._adding, self._noted = self._active(Adapter), frozenset[Place]()
        # Other modules around the same tensors: hooks on these are none on the base's.
        tensors = {id(one): one for one in (*base.model.parameters(), *base.model.buffers())}
        self._twin = copy.copy(base)
        self.model = self._twin.model = copy.deepcopy(base.model, tensors)
        self._twin.backbone = self.model.base_model
        ends = {"eos_token_id": base.model.generation_config.eos_token_id, "pad_token_id": base.tokenizer.pad_token_id}
        # Rows of the head beyond the tokenizer stand for no token.
        ends["suppress_tokens"] = [*range(base.vocab_size, len(self.model.get_output_embeddings().weight))] or None
        self.model.generation_config = GenerationConfig(**ends)
        self._own_generate, self.model.generate = self.model.generate, self._generate
        own_forward = self.model.forward

        @wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
                raise ChassisError("logits_to_keep picks positions, which adapters cannot follow: give a number")
            with self._passing:  # what hooks note in a pass is of that pass
                return own_forward(*args, **kwargs)
        self.model.forward = forward

    @property
    def in_use(self) -> dict[str, float]:
        """Weights of what is in use; empty for the bare base."""
        return dict(self._weights)

    def plug(self, name: str, plug: Plug | str | Path, strength: float = 1.0) -> None:
        """Plug in an adapter (or the folder or hub id of one), or a live expert, which is asked at every token.

        A live expert is a model with the base's tokenizer, a `Bridge` to such a one, or one that bridges itself. It
        reads the whole text at every token, without a cache: its cost grows with the text. ChassisError for a name that
        is taken, an adapter made for another base, head or tokenizer, a bridge to another tokenizer, an adapter that
        reads out another layer in place of the final one, or a strength that is no number of at least zero.
        """
        if not isinstance(name, str) or not name or not name.isprintable() or name in self.plugs:
            why = "taken" if isinstance(name, str) and name in self.plugs else "no text, or empty"
            raise ChassisError(f"the name {name!r:.80} is {why}: unplug it, or choose another")
        base = self.base
        plug = Adapter.load(plug, base) if isinstance(plug, str | Path) else plug
        if isinstance(plug, Adapter):
            plug.check_base(base)._check_sizes(base)
            plug = plug.to(base.device)
            if plug.onto != "final" and (plug.onto not in ("layer", "normed") or plug.layer != base.num_layers):
                why = f"it is added to '{plug.onto}' of layer {plug.layer}, in place of the base's final state"
                raise ChassisError(f"'{name}' cannot be plugged in, {why}: fit it at layer -1")
            if any(edit.changes == base.num_layers for edit in plug.edits):
                raise ChassisError(f"'{name}' edits the final layer, which the head reads: add that to its own map")
            with refusing(f"'{name}' cannot be plugged in, a pass with it fails", "fit it for this base"):
                token, wanted = torch.zeros(1, 1, dtype=torch.long), [*{*plug.reads, base.num_layers}]
                found = base.edited(*plug.edits).states(token, torch.ones_like(token), wanted)
                plug.logits(base, {place: state[0] for place, state in found.items()})
        elif isinstance(plug, LanguageModel | Bridge):
            own = plug.base if isinstance(plug, Bridge) else plug
            if own.tokenizer_hash != base.tokenizer_hash and own.tokenizer.get_vocab() != base.tokenizer.get_vocab():
                raise ChassisError(f"{own.name} and {base.name} differ in tokenizer: plug in Bridge(expert, base)")
        elif not isinstance(plug, Bridging) or isinstance(plug, type):
            raise ChassisError(f"a {type(plug).__name__} is no plug: give an adapter, its folder, or a live expert")
        self._strengths[name], self.plugs[name] = _weight(strength, f"strength of '{name}'"), plug

    def unplug(self, name: str) -> None:
        """Take a plug out; what else is in use stays so. ChassisError: there is none, or text is being generated."""
        self.use({other: weight for other, weight in self._weights.items() if other != name and weight} or None)
        del self.plugs[self._known(name)], self._strengths[name]

    def strength(self, name: str, strength: float) -> None:
        """Set how strongly a plug counts from here on, 1 as it was fitted; ChassisError as for `plug` and `use`."""
        with self._idle():
            self._strengths[self._known(name)] = _weight(strength, f"strength of '{name}'")
            self._install()

    def use(self, choice: str | Mapping[str, float] | None) -> None:
        """Use one plug, several by weight, or none (the bare base), from here on: a swap of hooks, of no weights.

        ChassisError for a name that is not plugged in, weights that are negative, no numbers or all zero, or while
        text is being generated.
        """
        if not isinstance(choice, str | Mapping | None):
            raise ChassisError(f"a {type(choice).__name__} is no choice: give a name, {{name: weight}}, or None")
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
        weights = {self._known(name): _weight(weight, f"weight of '{name}'") for name, weight in weights.items()}
        if choice is not None and not sum(weights.values()):
            raise ChassisError("the weights sum to zero: give one above zero, or None for the bare base")
        with self._idle():
            self._weights = weights
            self._install()

    def route(self, prompt: str) -> str | None:
        """Use the plug that the router takes a prompt to be for, from here on; its name, or None for the bare base.

        ChassisError: there is no router, it was fitted for another base, or its choice is not plugged in; see `use`.
        """
        if self.router is None or self.router.base.revision != self.base.revision:
            there = "no router" if self.router is None else f"a router for {self.router.base.name}"
            raise ChassisError(f"this port for {self.base.name} has {there}: set router to Router.fit(base, ...)")
        choice = self.router([prompt])["choice"][0]
        self.use(choice)
        return choice

    def _known(self, name: str) -> str:
        if not isinstance(name, str) or name not in self.plugs:
            raise ChassisError(f"'{name}' is not plugged in: choose from {', '.join(self.plugs) or 'none, plug one'}")
        return name

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Nothing may change under a generation, and none begins while something changes."""
        if not self._busy.acquire(blocking=False):
            raise ChassisError("text is being generated: let it end, or close its stream, first")
        try:
            yield
        finally:
            self._busy.release()

    def _active(self, kind: Any) -> list[_Weighted]:
        """What is in use of a kind, in the order it was plugged in: the order of a choice changes nothing."""
        several = [(plug, self._weights.get(name, 0.0) * self._strengths[name]) for name, plug in self.plugs.items()]
        return [_Weighted(plug, weight) for plug, weight in several if isinstance(plug, kind) and weight]

    def _install(self) -> None:
        """Let what is in use act on `model`; hooks stay where they are while the same places are noted."""
        with self._passing:
            base, final, active = self.base, self.base.num_layers, self._active(Adapter)
            edits = tuple(_Weighted(edit, one.weight) for one in active for edit in one.edits)
            self._adding, self._twin.edits = active, edits
            noted = {p for e in edits for p in (e.changes, *e.reads)} | {p for one in active for p in one.reads}
            if (noted := frozenset(noted | {final} if active else ())) == self._noted:
                return
            self._hooks.close()
            self._noted = noted
            if not noted:
                return
            seen = self._hooks.enter_context(self._twin.on_the_way([*noted], final))

            def before(_: torch.nn.Module, args: tuple) -> tuple:
                # In a prompt's pass the head may be given the last position alone.
                state, kept = args[0], args[0].shape[-2]
                seen[final] = state.float()
                for place in {place for one in self._adding for place in one.reads} - {final}:
                    seen[place] = seen[place][..., -kept:, :]
                inside = [one.correction(seen) for one in self._adding if one.space == "hidden"]
                return (state + sum(inside).to(state.dtype), *args[1:]) if inside else args

            def after(_: torch.nn.Module, args: tuple, logits: torch.Tensor) -> None:
                for one in self._adding:
                    if one.space == "logits":
                        where = slice(base.vocab_size) if one.columns is None else one.columns
                        logits[..., where] += one.correction(seen).to(logits.dtype) / base.readout.scale
            head = self.model.get_output_embeddings()
            self._hooks.enter_context(head.register_forward_pre_hook(before))
            self._hooks.enter_context(head.register_forward_hook(after))

    def _generate(self, inputs: Any = None, generation_config: Any = None, logits_processor: Any = None, **more) -> Any:
        """`transformers`' own generate, with what live experts say."""
        with self._idle():
            if live := self._active(Live):
                mask = more.get("attention_mask")
                starts = [0] if mask is None else (mask.shape[1] - mask.sum(1)).tolist()
                logits_processor = LogitsProcessorList([_Live(self.base, live, starts), *(logits_processor or [])])
            return self._own_generate(inputs, generation_config, logits_processor, **more)

    def probabilities(self, prompts: Sequence[str]) -> torch.Tensor:
        """What is said next behind each of n prompts with what is in use, `(n, vocab)`; ChassisError as `generate`."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise ChassisError("give a list of prompts, one or more")
        ids, mask = padded([self.base.prompt_ids(prompt) for prompt in prompts])
        ids, ends = ids.to(self.base.device), mask.sum(1) - 1
        with self._idle(), torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask.to(ids.device), use_cache=False).logits
            logits = logits[range(len(ids)), ends, : self.base.vocab_size].float()
            live = self._active(Live)
            for row, end, own in zip(ids, ends, logits, strict=True) if live else ():
                own.copy_(_Live(self.base, live, [0])(row[None, : end + 1], own[None])[0])
        return logits.softmax(-1)

    def generate(
        self, prompt: str | Sequence[str], *, stream: bool = False, max_new_tokens: int = 64,
        stop: str | Sequence[str] = (), seed: int = 0, **settings: Any,
    ) -> str | list[str] | Iterator[str]:  # fmt: skip
        """What the base writes behind a prompt, or behind each of several, with what is in use.

        A text ends before the first `stop` string, at the base's end of text, after `max_new_tokens`, or at the end of
        its context; a character that is cut off there is left out. With `stream` it comes piece by piece, whole
        characters each; closing the iterator ends the generation. It is greedy unless `temperature`, `top_k`, `top_p`,
        `min_p`, `typical_p`, `epsilon_cutoff` or `do_sample` is given, which draw by a `seed` of their own; the other
        `settings` are those of `transformers`' `generate`. ChassisError for a prompt that is no text or leaves no room
        in the context, an empty stop string, a setting that is unknown or the port's own, or several prompts to stream.
        """
        base, several = self.base, isinstance(prompt, Sequence) and not isinstance(prompt, str)
        stops = [*stop] if isinstance(stop, Sequence) and not isinstance(stop, str) else [stop]
        rows = [base.prompt_ids(one) for one in (prompt if several else [prompt])]
        numbers = isinstance(max_new_tokens, int) and isinstance(seed, int) and max_new_tokens > 0 <= seed < 2**63
        if not numbers or not rows or (stream and len(rows) != 1) or not all(isinstance(x, str) and x for x in stops):
            raise ChassisError("give a prompt, one to stream, stop strings that are not empty, 1 or more tokens, seed")
        if own := OWN & settings.keys():
            raise ChassisError(f"{', '.join(sorted(own))} is the port's to set: leave it out, or use port.model")
        limits = [min(max_new_tokens, base.context - len(row)) for row in rows]
        if min(limits) < 1:
            raise ChassisError(f"a prompt fills all {base.context} tokens that {base.name} takes: shorten it")
        if stream:
            return _until(self._streamed(rows[0], limits[0], stops, settings, seed), stops)
        texts = [""] * len(rows)
        for limit in sorted({*limits}):  # a long prompt leaves the others their room
            those = [i for i, own in enumerate(limits) if own == limit]
            written = self._written([rows[i] for i in those], limit, stops, settings, seed)
            for i, new in zip(those, written, strict=True):
                texts[i] = "".join(_until(map(_Text(base.tokenizer, rows[i]).add, new), stops))
        return texts if several else texts[0]

    def _written(
        self, rows: Sequence[list[int]], limit: int, stops: Sequence[str], settings: Mapping[str, Any], seed: int,
        pieces: _Pieces | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens behind each row."""
        ids, mask = (part.to(self.base.device) for part in padded(rows, "left"))
        ends = StoppingCriteriaList([_End(self.base.tokenizer, stops, ids.shape[1], pieces)])
        own = {"attention_mask": mask, "stopping_criteria": ends, "max_new_tokens": limit, "streamer": pieces}
        rest = {name: value for name, value in settings.items() if name not in (*_WARPERS, "do_sample")}
        try:
            cold = settings.get("temperature") == 0  # the limit of drawing
            wanted = {} if cold else {name: warp for name, warp in _WARPERS.items() if settings.get(name) is not None}
            draw = [warp(settings[name]) for name, warp in wanted.items()]
            if settings.get("do_sample", bool(draw)) and not cold:
                if settings.get("num_beams", 1) > 1 or any(settings[name] != settings[name] for name in wanted):
                    raise ValueError("beams do not draw, nor does NaN")
                draw.append(_Draw(torch.Generator(ids.device).manual_seed(seed)))
                rest["logits_processor"] = [*(rest.get("logits_processor") or ()), *draw]
            return self.model.generate(ids, **own, **rest)[:, ids.shape[1] :].tolist()
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, ImportError) as error:
            why = " ".join(str(error).split())[:200]
            raise ChassisError(f"transformers refuses these settings ({why}): see its GenerationConfig") from error

    def _streamed(self, row: list[int], *how: Any) -> Iterator[str]:
        """Pieces of a text while another thread writes it; that ends when nobody listens any more."""
        pieces = _Pieces(self.base.tokenizer)

        def write() -> None:
            try:
                self._written([row], *how, pieces)
                pieces.told.put(None)
            except BaseException as error:  # noqa: BLE001 - raised where the text is read
                pieces.told.put(error)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            while (piece := pieces.told.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            pieces.left = True
            if thread is not threading.current_thread():  # which may be where a forgotten stream is collected
                thread.join()

    def report(self) -> pd.DataFrame:
        """What is plugged in, one row each, the bare base first; `held_out_kl` is in nats, as the fit measured it."""
        rows = [{"plug": None, "kind": "base", "expert": self.base.name, "weight": float(not self._weights)}]
        for name, plug in self.plugs.items():
            row = {"plug": name, "strength": self._strengths[name], "weight": self._weights.get(name, 0.0)}
            if isinstance(plug, Adapter):
                row |= {"kind": "adapter", "method": plug.method, "rank": plug.rank, "edits": len(plug.edits)}
                row |= {"parameters": plug.num_parameters} | {k: plug.info.get(k) for k in ("expert", "held_out_kl")}
            else:
                own = getattr(plug, "expert", plug)  # of a bridge; an API has the name of its model
                named = getattr(own, "name", getattr(own, "model", None))
                row |= {"kind": "live", "method": type(plug).__name__, "expert": named and str(named)}
            rows.append(row)
        return pd.DataFrame(rows)


@dataclass
class _Live(LogitsProcessor):
    """What live experts say, on top of scores `(n, vocab or more)`; rows begin at `starts`, after their padding."""

    base: LanguageModel
    live: Sequence[_Weighted]
    starts: Sequence[int]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        base, several = self.base, len(input_ids) // len(self.starts)  # of beams there are several a row
        rows = [row[self.starts[i // several] :] for i, row in enumerate(input_ids.tolist())]
        ids, mask = padded(rows)
        texts = [base.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        own = _last(base, ids, mask)
        for one in self.live:
            plug, asked = one.adapter, [*range(len(rows))]
            if isinstance(plug, LanguageModel):
                told = _last(plug, ids, mask).to(own)
            else:
                # Behind a part of a character there is no text to give: the base goes on alone.
                if not (asked := [i for i in asked if not texts[i].endswith("\ufffd")]):
                    continue
                given = [texts[i] for i in asked]
                with refusing(f"a live expert, {type(plug).__name__}, failed", "mend it, or unplug it"):
                    found = plug(None, given) if isinstance(plug, Bridge) else plug.bridged(base, given, progress=False)
                    mass = found.mass.to(own)
                    if mass.shape != (len(given), base.vocab_size + 2) or not bool(((mass >= 0) & (mass < 1.1)).all()):
                        raise ChassisError(f"{tuple(mass.shape)} numbers that are no probabilities (n, vocab + 2)")
                told = mass[:, :-2] + mass[:, -2:].sum(1, keepdim=True) * own[asked]
            change = told.clamp(min=1e-30).log() - own[asked].clamp(min=1e-30).log()
            scores[asked, : base.vocab_size] += (one.weight * change).to(scores)
        return scores.log_softmax(-1)  # beams add up what is normalised


def _last(model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a model says behind each padded row, `(n, vocab)`, float64."""
    if ids.shape[1] > model.context:
        raise ChassisError(f"the text has {ids.shape[1]} tokens, {model.name} takes {model.context}: shorten it")
    state = model.states(ids, mask)[model.num_layers][range(len(ids)), mask.sum(1) - 1]
    return model.readout(state).double().softmax(-1)


@dataclass
class _Draw(LogitsProcessor):
    """Draws a token, which is left as the likeliest: by dice of its own, where torch has one generator for all."""

    dice: torch.Generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The first of several clocks to ring, each at the speed of its probability.
        waits = torch.empty_like(scores, dtype=torch.double).exponential_(generator=self.dice)
        return (scores.double().softmax(-1) / waits).log()


class _End(StoppingCriteria):
    """Ends a row whose new text, behind `length` tokens, holds a stop string, and all when nobody listens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], length: int, pieces: _Pieces | None) -> None:
        self.tokenizer, self.stops, self.length, self.pieces = tokenizer, stops, length, pieces
        # A stop string has no more tokens than bytes; one token more may hold its end, another its beginning.
        self.reach = max((len(stop.encode(errors="replace")) for stop in stops), default=0) + 2

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        start = max(self.length, input_ids.shape[1] - self.reach)
        behind, left = max(0, start - TAIL), self.pieces is not None and self.pieces.left
        ended = [left] * len(input_ids)
        for i, row in enumerate(input_ids[:, behind:].tolist() if self.stops and not left else ()):
            before, whole = (self.tokenizer.decode(x, skip_special_tokens=True) for x in (row[: start - behind], row))
            ended[i] = any(stop in whole[len(before) :] for stop in self.stops)
        return torch.tensor(ended, device=input_ids.device)


class _Text:
    """The text of tokens behind others, token by token; a part of a character waits for the rest."""

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self.tokenizer, self.ids, self.start, self.read = tokenizer, [*before], 0, len(before)

    def add(self, token: int) -> str:
        """What a token adds, as it stands behind the last piece: a first space depends on that."""
        self.ids.append(token)
        parts = self.ids[self.start : self.read], self.ids[self.start :]
        before, whole = (self.tokenizer.decode(part, skip_special_tokens=True) for part in parts)
        if whole.endswith("\ufffd") or not (piece := whole[len(before) :]):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return piece


class _Pieces(BaseStreamer):
    """Hands on what every token adds to a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text, self.left = tokenizer, None, False
        self.told: Queue[str | BaseException | None] = Queue()

    def put(self, value: torch.Tensor) -> None:
        if self.text is None:  # the prompt comes first
            self.text = _Text(self.tokenizer, value.flatten().tolist())
        else:
            self.told.put(self.text.add(int(value)))

    def end(self) -> None:
        """Every whole character was handed on."""


def _until(pieces: Iterator[str] | Sequence[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the first stop string; what may be the beginning of one waits for what follows."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for at in map(held.find, stops) if at >= 0]:
            held = held[: min(found)]
            break
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def _weight(value: Any, name: str) -> float:
    """A number from 0 to a million, or ChassisError."""
    if not (isinstance(value, Real) and 0 <= value <= 1e6):
        raise ChassisError(f"{name} is {value!r:.40}: give a finite number of at least zero, at most a million")
    return float(value)
