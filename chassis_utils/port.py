"""The port: one frozen base, and experts that are plugged in, swapped, mixed and generated with."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pandas as pd
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .activations import padded
from .adapter import Adapter
from .api import ApiExpert
from .bridge import Bridge
from .errors import ChassisError
from .models import LanguageModel, Place
from .router import Router

Live = LanguageModel | Bridge | ApiExpert  #: An expert that runs beside the base and is asked at every token
Plug = Adapter | Live
TAIL = 8  # tokens of a prompt that a continuation is decoded behind: its first space depends on them


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

    `model` is the base as `transformers` knows it, with what is in use at work in every pass: its own `generate`,
    streamers and pipelines do as ever. It shares every weight with the base, whose own passes stay bare. What is in use
    adds up: the logits are the base's, plus for each plug `weight * strength * (what it says - what the base says)`.
    Of an adapter that is its correction (with edits on the way, the edits are weighted); of a live expert the
    difference of log probabilities, what a bridge could not place being left to the base.
    """

    def __init__(self, base: LanguageModel, router: Router | None = None) -> None:
        if base.edits:
            raise ChassisError(f"{base.name} has edits already: give the bare model, and plug them in")
        self.base, self.router = base, router
        self.plugs: dict[str, Plug] = {}
        self._strengths: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._busy, self._hooks = threading.Lock(), ExitStack()
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

    @property
    def in_use(self) -> dict[str, float]:
        """Weights of what is in use; empty for the bare base."""
        return dict(self._weights)

    def plug(self, name: str, plug: Plug | str | Path, strength: float = 1.0) -> None:
        """Plug in an adapter (or the folder or hub id of one), or a live expert, which is asked at every token.

        A live expert is a model with the base's tokenizer, a `Bridge` to the base, or an `ApiExpert`. ChassisError for
        a name that is taken, an adapter or bridge made for another base, head or tokenizer, an adapter that reads out
        another layer in place of the final one, or a strength that is no number of at least zero.
        """
        if not name or name in self.plugs:
            raise ChassisError(f"the name '{name}' is {'taken' if name else 'empty'}: unplug it, or choose another")
        base = self.base
        if isinstance(plug, str | Path):
            plug = Adapter.load(plug, base)
        if isinstance(plug, Adapter):
            plug = plug.check_base(base).to(base.device)
            if plug.onto != "final" and (plug.onto not in ("layer", "normed") or plug.layer != base.num_layers):
                why = f"it is added to '{plug.onto}' of layer {plug.layer}, in place of the base's final state"
                raise ChassisError(f"'{name}' cannot be plugged in, {why}: fit it at layer -1")
        elif isinstance(plug, LanguageModel | Bridge):
            own = plug.base if isinstance(plug, Bridge) else plug
            if own.tokenizer_hash != base.tokenizer_hash and own.tokenizer.get_vocab() != base.tokenizer.get_vocab():
                raise ChassisError(f"{own.name} and {base.name} differ in tokenizer: plug in Bridge(expert, base)")
        elif not isinstance(plug, ApiExpert):
            raise ChassisError(f"a {type(plug).__name__} is no plug: give an adapter, its folder, or a live expert")
        self._strengths[name] = _weight(strength, f"strength of '{name}'")
        self.plugs[name] = plug

    def unplug(self, name: str) -> None:
        """Take a plug out; what else is in use stays so. ChassisError: there is none, or text is being generated."""
        self.use({other: weight for other, weight in self._weights.items() if other != name and weight} or None)
        self.plugs.pop(self._known(name))
        del self._strengths[name]

    def strength(self, name: str, strength: float) -> None:
        """Set how strongly a plug counts from here on, 1 as it was fitted; ChassisError as for `plug` and `use`."""
        value = _weight(strength, f"strength of '{name}'")
        with self._idle():
            self._strengths[self._known(name)] = value
            self._install()

    def use(self, choice: str | Mapping[str, float] | None) -> None:
        """Use one plug, several by weight, or none (the bare base), from here on: a swap of hooks, of no weights.

        ChassisError for a name that is not plugged in, weights that are negative, no numbers or all zero, or while
        text is being generated.
        """
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
        if name not in self.plugs:
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
        chosen = ((name, plug) for name, plug in self.plugs.items() if self._weights.get(name))
        several = [(plug, self._weights[name] * self._strengths[name]) for name, plug in chosen]
        return [_Weighted(plug, weight) for plug, weight in several if isinstance(plug, kind) and weight]

    def _install(self) -> None:
        """Put the hooks of what is in use on `model`, in place of those that are there."""
        self._hooks.close()
        if not (active := self._active(Adapter)):
            return
        base, final, scale = self.base, self.base.num_layers, self.base.readout.scale
        edits = [_Weighted(edit, one.weight) for one in active for edit in one.edits]
        places = {place for one in active for place in one.reads} - {final}
        seen = self._hooks.enter_context(self._twin.edited(*edits).on_the_way([*places], final))
        inside = [one for one in active if one.space == "hidden"]
        behind = [one for one in active if one.space == "logits"]

        def before(_: torch.nn.Module, args: tuple) -> tuple:
            # In a prompt's pass the head may be given the last position alone.
            state, kept = args[0], args[0].shape[-2]
            seen[final] = state.float()
            for place in places:
                seen[place] = seen[place][..., -kept:, :]
            return (state + sum(one.correction(seen) for one in inside).to(state.dtype), *args[1:]) if inside else args

        def after(_: torch.nn.Module, args: tuple, logits: torch.Tensor) -> None:
            for one in behind:
                change = one.correction(seen).to(logits.dtype) / scale
                where = slice(base.vocab_size) if one.columns is None else one.columns
                logits[..., where] += change

        head = self.model.get_output_embeddings()
        self._hooks.enter_context(head.register_forward_pre_hook(before))
        self._hooks.enter_context(head.register_forward_hook(after))

    def _generate(self, *args: Any, **settings: Any) -> Any:
        """`transformers`' own generate, with what live experts say."""
        with self._idle():
            if live := self._active(Live):
                mask = settings.get("attention_mask")
                starts = [0] if mask is None else (mask.shape[1] - mask.sum(1)).tolist()
                others = settings.get("logits_processor") or []
                settings["logits_processor"] = LogitsProcessorList([_Live(self.base, live, starts), *others])
            return self._own_generate(*args, **settings)

    def probabilities(self, prompts: Sequence[str]) -> torch.Tensor:
        """What is said next behind each of n prompts with what is in use, `(n, vocab)`; ChassisError as `generate`."""
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

        The text ends before the first `stop` string, at the base's end of text, after `max_new_tokens`, or at the end
        of its context. With `stream` it comes piece by piece, whole characters each; closing the iterator ends the
        generation. `settings` are those of `transformers`' `generate` (`temperature`, `top_p`, `num_beams`, ...): it is
        greedy unless they sample, and the same `seed` draws the same text. ChassisError for a prompt that is no text or
        leaves no room in the context, an empty stop string, an unknown setting, or several prompts to stream.
        """
        prompts, stops = ([one] if isinstance(one, str) else [*one] for one in (prompt, stop))
        if not all(stops) or (stream and len(prompts) != 1) or max_new_tokens < 1 or not prompts:
            raise ChassisError("give a prompt (one to stream), stop strings that are not empty, and 1 or more tokens")
        rows = [self.base.prompt_ids(one) for one in prompts]
        if (room := self.base.context - max(map(len, rows))) < 1:
            raise ChassisError(f"a prompt fills all {self.base.context} tokens that {self.base.name} takes: shorten it")
        ids, mask = (part.to(self.base.device) for part in padded(rows, "left"))
        sampling = {"do_sample": not {"temperature", "top_p", "top_k", "min_p"}.isdisjoint(settings)} | settings
        end = _End(self.base.tokenizer, stops, ids)
        options = {"attention_mask": mask, "stopping_criteria": StoppingCriteriaList([end]), **sampling}
        options["max_new_tokens"] = min(max_new_tokens, room)
        if stream:
            return _until(self._streamed(ids, options, seed, end), stops)
        texts = ["".join(_until([end.text(row)], stops)) for row in self._seeded(ids, options, seed)]
        return texts[0] if isinstance(prompt, str) else texts

    def _seeded(self, ids: torch.Tensor, options: dict[str, Any], seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[self.base.device] if self.base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                return self.model.generate(ids, **options)
            except (ValueError, TypeError) as error:
                why = " ".join(str(error).split())[:200]
                raise ChassisError(f"transformers refuses these settings ({why}): see its GenerationConfig") from error

    def _streamed(self, ids: torch.Tensor, options: dict[str, Any], seed: int, end: _End) -> Iterator[str]:
        """Pieces of a text while another thread writes it; that ends when nobody listens any more."""
        pieces: Queue[str | BaseException | None] = Queue()

        def write() -> None:
            try:
                self._seeded(ids, options | {"streamer": _Pieces(end, pieces)}, seed)
                pieces.put(None)
            except BaseException as error:  # noqa: BLE001 - raised where the text is read
                pieces.put(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            end.left = True
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
                row |= {"kind": "live", "method": type(plug).__name__, "expert": getattr(own, "name", own.model)}
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
        # Behind a part of a character nothing can be asked: there the base goes on alone.
        asked = [i for i, text in enumerate(texts) if not text.endswith("\ufffd")]
        own = _last(base, ids, mask)
        for one in self.live if asked else ():
            plug = one.adapter
            if isinstance(plug, LanguageModel):
                told = _last(plug, ids, mask).to(own)[asked]
            else:
                given = [texts[i] for i in asked]
                found = plug(None, given) if isinstance(plug, Bridge) else plug.bridged(base, given, progress=False)
                told = (found.probabilities + found.unplaced[:, None] * own[asked].cpu()).to(own)
            change = told.clamp(min=1e-30).log() - own[asked].clamp(min=1e-30).log()
            scores[asked, : base.vocab_size] += (one.weight * change).to(scores)
        return scores


def _last(model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a model says behind each padded row, `(n, vocab)`, float64."""
    state = model.states(ids, mask)[model.num_layers][range(len(ids)), mask.sum(1) - 1]
    return model.readout(state).double().softmax(-1)


class _End(StoppingCriteria):
    """Ends a row whose new text holds a stop string, and all when nobody listens; knows what is new in a row."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: torch.Tensor) -> None:
        self.tokenizer, self.stops, self.length, self.left = tokenizer, stops, prompt.shape[1], False
        # A stop string has no more tokens than bytes; one token more may hold its end, another its beginning.
        self.reach = max((len(stop.encode()) for stop in stops), default=0) + 2

    def text(self, row: torch.Tensor, recent: int | None = None) -> str:
        """The text of a row's new tokens, or of the `recent` last ones, as it stands behind what comes before."""
        start = self.length if recent is None else max(self.length, len(row) - recent)
        ids = row[max(0, start - TAIL) :].tolist()
        known = ids[: start - len(row)]
        before, whole = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (known, ids))
        return whole[len(before) :]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        recent = [self.text(row, self.reach) if self.stops else "" for row in input_ids]
        ended = [self.left or any(stop in text for stop in self.stops) for text in recent]
        return torch.tensor(ended, device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands on what is new in a text with every token; a part of a character waits for its end."""

    def __init__(self, end: _End, pieces: Queue) -> None:
        self.end_of, self.pieces, self.ids, self.sent = end, pieces, torch.empty(0, dtype=torch.long), 0

    def put(self, value: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, value.flatten().cpu()])
        if len(self.ids) > self.end_of.length and not (text := self.end_of.text(self.ids)).endswith("\ufffd"):
            self.pieces.put(text[self.sent :])
            self.sent = len(text)

    def end(self) -> None:
        self.pieces.put(self.end_of.text(self.ids)[self.sent :])


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
    """A finite number of at least zero, or ChassisError."""
    number = float(value) if isinstance(value, int | float) else math.nan
    if not 0 <= number < math.inf:
        raise ChassisError(f"{name} is {value!r}: give a finite number of at least zero")
    return number
