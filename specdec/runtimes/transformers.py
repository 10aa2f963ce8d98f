"""The fallback runtime: any decoder-only Hugging Face model, through its own ``forward``.

``TransformersTarget.layers`` runs layers [lo, hi) by a call of the model's ``forward``, in which these parts of the
model are replaced:

    part of the model                 during the call
    decoder layers 0 to N - 1         ``_Gate``: runs its layer if that is in [lo, hi), else returns its input; the
                                      first one puts the input of layer lo in the place of the token embeddings
    recurrent mixer of such a layer   ``_Mixer``: runs the mixer with the states in the ``KVCache``
    argument ``past_key_values``      ``_Bridge``: the ``KVCache`` with the interface of transformers' ``Cache``
    argument ``attention_mask``       the mask of the pass, in the form that the layers take (``with_mask``)
    a causal mask of its own          a mask that hides nothing (GPT-Neo, ``_by_position``)
    query projection that is scaled   ``_Tempered``: scales each query by its own position (Llama 4, ``_by_position``)
    by the number of tokens so far

So position embeddings, rotary tables, final norms and logit caps are the model's own.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.kvcache.recurrent import Advance, States
from specdec.models.native_model import AnyModel, as_transformers
from specdec.runtimes.checks import check_logits, refuse_tangled, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.narrow import narrow_maps
from specdec.runtimes.target import GivenLinear, Pass, Target

STEPPED_TOKENS = 16  # up to this many tokens, running them one by one is faster than a scan of a whole chunk


class TransformersTarget(Target):
    """The fallback runtime: runs any decoder-only Hugging Face model by its own ``forward``, a range of layers a call.

    Modules of the model are replaced while a call runs, under the model's lock, so threads take turns. The constructor
    compares logits of such calls with those of a whole forward. Raises SpecDecError with the reason for an unsupported
    model.

    attention: the model's attention implementation, "sdpa" or "eager".
    base: the model without its output head.
    decoder, head: (owner module, attribute name) of the list of decoder layers, and of the output head.
    blocks: the modules of the decoder layers.
    mixers: for each layer, attribute name of its recurrent mixer; None: it has attention.
    counting: for each layer, its attention modules that read the number of tokens so far (``_by_position``).
    mask_index: index of the attention mask among a layer's positional arguments after the hidden states; None: it has
        no argument of that name.
    extra_outputs: number of values that a layer returns in a tuple after the hidden states; None: it returns a tensor.
    probed: whether ``extra_outputs`` is known.
    bridge: the KV cache of the call that runs, for the layers; None: none runs.
    """

    runtime = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        model = as_transformers(model)
        refuse_unsupported(model)
        refuse_tangled(model)
        super().__init__(model)
        if (short := min(_rotated_alike(model.config.get_text_config()), default=self.context)) < self.context:
            what = f"texts may have {short} tokens in place of {self.context}: in longer ones this model (longrope)"
            warnings.warn(f"{what} rotates all tokens in another way", SpecDecWarning, stacklevel=2)
            self.context = short
        self.attention = model.config._attn_implementation
        self.base = model.base_model
        self.extra_outputs: int | None = None
        self.bridge: _Bridge | None = None
        self.probed = False
        self._narrow: WeakKeyDictionary[Adapters, dict[int, dict[str, nn.Module]]] = WeakKeyDictionary()
        with self.lock:
            is_stack = lambda module: isinstance(module, nn.ModuleList) and len(module) == self.num_layers  # noqa: E731
            self.decoder = _find(model.base_model, is_stack, f"has no list of {self.num_layers} decoder layers")
            self.head = _find(model, lambda module: module is self.own_head, "hides its output head")
            self.blocks = list(getattr(*self.decoder))
            self.mixers = [_mixer(block) for block in self.blocks]
            self.recurrent_layers = frozenset(n for n, mixer in enumerate(self.mixers) if mixer is not None)
            kinds = GPTNeoSelfAttention, Llama4TextAttention
            self.counting = [[part for part in block.modules() if isinstance(part, kinds)] for block in self.blocks]
            parameters = list(inspect.signature(self.blocks[0].forward).parameters)
            # GPT-2 passes the mask by position, the others by name.
            self.mask_index = parameters.index("attention_mask") - 1 if "attention_mask" in parameters else None
            self.logit_difference = check_logits(self)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        if not self.probed:
            self._probe(ids, positions)
        call = _Call()
        self._run(call, self.base, ids, positions)
        assert call.result is not None
        return call.result

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        taps = {} if ctx.taps is None else ctx.taps
        if lo in taps:
            taps[lo] = x
        if lo >= hi:
            return x
        with self.lock, self._adapt(ctx.adapters, lo, hi):
            return self._pass(_Call(x, lo, hi, ctx.mask, taps), ctx)

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        with self.lock, nullcontext() if head is None else _replaced(*self.head, head):
            return self._run(_Call(x), self.model, ids, ids).logits

    def beside(self, model: AnyModel) -> TransformersTarget:
        return TransformersTarget(as_transformers(model))

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        found = {}
        with self.lock:
            modules = list(self.blocks[layer].named_modules())
        for path, module in modules:
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                found[path] = (module.in_features, module.out_features)
            elif type(module).__name__ == "Conv1D" and weight is not None:
                found[path] = (weight.shape[0], weight.shape[1])
        # Experts and routers see tokens in another order: adapters cannot act on "the last tokens" there.
        return {path: size for path, size in found.items() if "expert" not in path and "router" not in path}

    def block(self, layer: int) -> nn.Module:
        return self.blocks[layer]

    def as_output(self, hidden: Tensor) -> Any:
        """Return hidden states in the form of a layer's output: a tensor, or a tuple (hidden, None, None, ..).

        The tuple has ``extra_outputs`` times None, so that the model's ``forward`` can unpack it as a layer's output.

        hidden: hidden states, [B, T, D].
        """
        return hidden if self.extra_outputs is None else (hidden, *[None] * self.extra_outputs)

    def _probe(self, ids: Tensor, positions: Tensor) -> None:
        """Run the first layer to find out whether layers return a tensor or a tuple; set ``extra_outputs``, ``probed``.

        ``embed`` calls it once, before the first pass. The result of the layer is not used.

        ids, positions: token ids and positions of the pass, int64 [B, T].
        """
        cache = self.new_cache(ids.shape[0])
        mask = cache.register(0, positions)
        self._pass(_Call(hi=1, mask=mask), Pass(positions, mask, cache))
        self.probed = True

    def _pass(self, call: _Call, ctx: Pass) -> Tensor:
        ids, bridge = torch.zeros_like(ctx.positions), _Bridge(ctx.cache)
        start, self.bridge = ctx.cache.lengths[call.lo], bridge
        with ExitStack() as stack:
            stack.callback(setattr, self, "bridge", None)
            for layer in range(call.lo, call.hi):
                if (name := self.mixers[layer]) is not None:
                    mixer = _Mixer(getattr(self.blocks[layer], name), layer, bridge, ctx.mask.ancestors)
                    stack.enter_context(_replaced(self.blocks[layer], name, mixer))
                for attention in self.counting[layer]:
                    stack.enter_context(_by_position(attention, ctx))
            self._run(call, self.base, ids, ctx.positions, cache=bridge, use_cache=True)
        # Layers without attention also count their tokens.
        ctx.cache.lengths[call.lo : call.hi] = [start + ids.shape[1]] * (call.hi - call.lo)
        assert call.result is not None
        return call.result

    def _run(self, call: _Call, module: nn.Module, ids: Tensor, positions: Tensor, **arguments: Any) -> Any:
        (batch, count), arguments = ids.shape, {"use_cache": False} | arguments
        # Hugging Face's forwards pass a 4D mask on unchanged; the gates replace it by the real one.
        mask = torch.ones(1, dtype=torch.bool, device=ids.device).expand(batch, 1, count, count)
        with self.lock:
            gates = nn.ModuleList([_Gate(self.blocks[index], self, index, call) for index in range(self.num_layers)])
            with _replaced(*self.decoder, gates):
                return module(input_ids=ids, position_ids=positions, attention_mask=mask, **arguments)

    @contextmanager
    def _adapt(self, adapters: Adapters | None, lo: int, hi: int) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in range(lo, hi) if adapters is not None else ():
                assert adapters is not None
                for path, module in self._narrowed(adapters, layer).items():
                    owner, _, name = path.rpartition(".")
                    hooks.enter_context(_replaced(self.blocks[layer].get_submodule(owner), name, module))
                for path, (down, up) in adapters.factors(layer).items():
                    hook = _adapter_hook(self, down, up)
                    handle = self.blocks[layer].get_submodule(path).register_forward_hook(hook)
                    hooks.callback(handle.remove)
            yield

    def _narrowed(self, adapters: Adapters, layer: int) -> dict[str, nn.Module]:
        """Return the linear layers of a decoder layer's MLP with only the neurons that ``adapters`` run.

        The result is cached. It is {module path relative to the decoder layer: linear layer}; {}: all neurons run.

        adapters: the adapters, which choose the neurons. layer: number of the decoder layer.
        """
        made = self._narrow.setdefault(adapters, {})
        if layer not in made:
            maps = narrow_maps(self.blocks[layer], adapters.kept(layer))
            made[layer] = {path: GivenLinear(*each) for path, each in maps.items()}
        return made[layer]

    def with_mask(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Mask | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a decoder layer's forward with the attention mask replaced by ``mask``.

        The mask takes the form of the attention implementation: bool for "sdpa", 0 and the least number for "eager",
            both [B, 1, T, S], or None for "sdpa" if attention is simply causal.

        layer: number of the decoder layer, whose window the mask gets.
        args, kwargs: the layer's arguments after the hidden states.
        mask: which keys each token attends to; None raises AssertionError, since such a call runs no layer.

        Returns the new (args, kwargs).
        """
        assert mask is not None
        window, (batch, t), length = self.windows[layer], mask.query.shape, mask.length
        key = ("hf", window)
        if self.attention == "sdpa" and mask.causal and length == t > 1 and (window is None or window >= t):
            mask.memo[key] = None  # without a mask, attention is causal
        elif key not in mask.memo:
            visible = mask.bool_mask(window)
            if visible is None:
                visible = torch.ones(batch, 1, t, length, dtype=torch.bool, device=self.device)
            if self.attention == "eager":
                low = torch.finfo(self.dtype).min
                visible = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, low)
            mask.memo[key] = visible
        if self.mask_index is not None and len(args) > self.mask_index:
            return (*args[: self.mask_index], mask.memo[key], *args[self.mask_index + 1 :]), kwargs
        return args, kwargs | {"attention_mask": mask.memo[key]}


@dataclass
class _Call:
    """One call of the model's ``forward``, in which only layers [lo, hi) run.

    x: input of layer ``lo``, [B, T, D]; None: the model's own token embeddings.
    lo, hi: the layers to run. lo = hi: none.
    mask: which cached keys each token attends to; None: no layer runs.
    taps: hidden states to collect, [B, T, D] by layer number: the input of a layer, or of ``hi`` the output of the last
        one.
    result: set by the call: the output of layer ``hi - 1``, or the token embeddings if no layer runs, [B, T, D].
    """

    x: Tensor | None = None
    lo: int = 0
    hi: int = 0
    mask: Mask | None = None
    taps: dict[int, Tensor] = field(default_factory=dict)
    result: Tensor | None = None


class _Replacement(nn.Module):
    """A module that stands in the place of the module ``inner`` during one call: base of ``_Gate`` and ``_Mixer``.

    Reading an attribute that it lacks gives that of ``inner``, which is not registered as a submodule.
    """

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = inner  # not registered as a submodule: the model keeps its own module tree

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class _Gate(_Replacement):
    """Stands in the place of a decoder layer while the model's ``forward`` runs, so that only layers [lo, hi) run.

    A layer outside that range is skipped: its input is returned. Hidden states are stored where the call asks for them.

    inner: the decoder layer.
    target: the runtime, which knows the form of masks and outputs.
    index: number of the layer.
    call: the range of layers, their input, and where results are stored.
    """

    def __init__(self, inner: nn.Module, target: TransformersTarget, index: int, call: _Call) -> None:
        super().__init__(inner)
        self.target = target
        self.index = index
        self.call = call

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer if it is in the call's range [lo, hi), and return its output; else return its input.

        hidden: input of the layer, [B, T, D]. For layer 0 it is the token embeddings, which the input of layer lo
            replaces.
        args, kwargs: further arguments of the layer. The attention mask among them is replaced by the call's.
        Returns the hidden states [B, T, D], in a tuple if the model's layers return tuples.
        """
        call, target, index = self.call, self.target, self.index
        if index == 0:
            call.result = hidden
            hidden = hidden if call.x is None else call.x
        if call.lo <= index < call.hi:
            if index in call.taps:
                call.taps[index] = hidden
            args, kwargs = target.with_mask(index, args, kwargs, call.mask)
            out = self.inner(hidden, *args, **kwargs)
            hidden, *others = out if isinstance(out, tuple) else (out,)
            target.extra_outputs = len(others) if isinstance(out, tuple) else None
            if index == call.hi - 1:
                call.result = hidden
                if call.hi in call.taps:
                    call.taps[call.hi] = hidden
        return target.as_output(hidden)


class _Mixer(_Replacement):
    """Stands in the place of a layer's recurrent mixer during a call, and keeps the mixer's states in the ``KVCache``.

    inner: the recurrent mixer.
    index: number of the layer.
    bridge: the KV cache of the call, as the mixer reads it.
    tree: which uncommitted tokens each token follows, bool [T, U] or [B, T, U]; None: all before it.
    """

    def __init__(self, inner: nn.Module, index: int, bridge: _Bridge, tree: Tensor | None) -> None:
        super().__init__(inner)
        self.index = index
        self.bridge = bridge
        self.tree = tree

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the mixer on hidden states [B, T, D] after the states in the KV cache, and return its output [B, T, D].

        args, kwargs: the mixer's further arguments; the attention mask is replaced by None.
        """
        arguments = {name: None if name == "attention_mask" else value for name, value in kwargs.items()}
        advance = self.bridge.advance(lambda x: self.inner(x, *args, **arguments), self._most_stepped())
        out: Tensor = self.bridge.kv.run_recurrent(self.index, hidden_states, self.tree, advance)
        return out

    def _most_stepped(self) -> float:
        """Return up to how many tokens of a pass are run one by one if earlier tokens have left states.

        More tokens are run in one scan. Infinity: never in one scan, because the mixer scans only from an empty state.
        """
        if hasattr(self.inner, "dt_proj"):  # Mamba scans several tokens only from an empty state
            return math.inf
        if hasattr(self.inner, "A_log") and hasattr(self.inner, "D"):  # Mamba 2 pads them to a chunk
            return STEPPED_TOKENS
        return 1


class _Tempered(_Replacement):
    """Stands in the place of a query projection of Llama 4, and scales each query by its attention temperature.

    inner: the query projection.
    scales: the factor of each token's query, float32 [B, T, 1].
    """

    def __init__(self, inner: nn.Module, scales: Tensor) -> None:
        super().__init__(inner)
        self.scales = scales

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scaled queries [B, T, H d] of hidden states [B, T, D]."""
        queries: Tensor = self.inner(hidden)
        return (queries * self.scales).to(queries.dtype)


class _Bridge(Cache):
    """A ``KVCache`` with the interface of transformers' ``Cache``, for the attention and recurrent mixers of one call.

    kv: the KV cache.
    states: states of the recurrent layer that runs, by (kind, index) such as ("conv", 0), [B, ...] each; {} before the
        first token.
    adapted: whether adapters add their low-rank terms at present.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__(layers=[])
        self.kv = cache
        self.states: States = {}
        self.adapted = True

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.kv.append(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kv.lengths[layer_idx]

    # A recurrent mixer reads its convolution and recurrent states here, and stores the states after its tokens.

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # else one token's convolution changes its state in place

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state = self.states.get(("recurrent", state_idx))
        if state is not None:  # one token's update may change it in place
            state = self.states["recurrent", state_idx] = state.clone()
        return state

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        old = self.states.get(("conv", state_idx))
        full = conv_states if old is None else torch.cat((old, conv_states), -1)
        size = conv_kernel_size or full.shape[-1]
        self.states["conv", state_idx] = F.pad(full, (max(size - full.shape[-1], 0), 0))[..., -size:]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def advance(self, mixer: Callable[[Tensor], Tensor], most: float) -> Advance:
        """Return a function that runs a mixer from given states: ``(x, states, adapted) -> (output, new states)``.

        Here x and the output are [B, T, D], states are by (kind, index), and adapted says whether adapters apply.

        mixer: a recurrent mixer's forward, [B, T, D] -> [B, T, D], which reads and writes ``states`` of this object.
        most: maximum number of tokens that are run one by one if there are earlier states; more run in one call of the
            mixer.
        """

        def run(x: Tensor, states: States, adapted: bool) -> tuple[Tensor, States]:
            self.states, self.adapted, single = dict(states), adapted, bool(states) and x.shape[1] <= most
            try:
                if not single:
                    return mixer(x), self.states
                return torch.cat([mixer(token) for token in x.split(1, 1)], 1), self.states
            finally:
                self.adapted = True  # for the rest of the layer

        return run


def _adapter_hook(target: TransformersTarget, down: Tensor, up: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if target.bridge is not None and not target.bridge.adapted:
            return output
        return output + (inputs[0] @ down.T.to(output.dtype)) @ up.T.to(output.dtype)

    return hook


def _mixer(block: nn.Module) -> str | None:
    """Return the attribute name of a decoder layer's recurrent mixer; None: the layer has none.

    That is the child module of ``block`` that has an ``nn.Conv1d`` as a child.
    """
    for name, child in block.named_children():
        if any(isinstance(part, nn.Conv1d) for part in child.children()):
            return name
    return None


@contextmanager
def _by_position(attention: Any, ctx: Pass) -> Iterator[None]:
    """Let an attention module read the mask and the positions of the pass ``ctx``, and not the number of tokens so far.

    From that number, GPT-Neo makes a mask of its own and Llama 4 the temperature of each query. Rows of different
    lengths and the branches of a tree do not fit it.
    """
    with ExitStack() as stack:
        if isinstance(attention, GPTNeoSelfAttention):
            nothing_hidden = attention.bias.new_ones(()).expand(1, 1, ctx.mask.length, ctx.mask.length)
            stack.enter_context(_replaced(attention, "bias", nothing_hidden))
        elif attention.attn_temperature_tuning and not attention.use_rope:
            steps = torch.floor((ctx.positions.float() + 1) / attention.floor_scale)
            scales = torch.log1p(steps) * attention.attn_scale + 1  # (B, T)
            stack.enter_context(_replaced(attention, "attn_temperature_tuning", False))
            stack.enter_context(_replaced(attention, "q_proj", _Tempered(attention.q_proj, scales[..., None])))
        yield


def _rotated_alike(config: Any) -> Iterator[int]:
    """Yield the numbers of tokens beyond which rotations of type "longrope" in a ``config`` are others for all tokens.

    A cache would then hold keys of both kinds.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for part in (given, *given.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            own = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            yield int(part.get("original_max_position_embeddings") or own)


def _find(root: Any, wanted: Callable[[nn.Module], bool], problem: str) -> tuple[nn.Module, str]:
    """Find the first module that satisfies ``wanted``; return (its parent module, its attribute name there).

    root: the model that is searched.
    problem: end of the message of the SpecDecError that is raised if there is none, such as "hides its output head".
    """
    for owner in root.modules():
        for name, child in owner.named_children():
            if wanted(child):
                return owner, name
    raise SpecDecError(f"model type '{root.config.model_type}' {problem}; not supported")


@contextmanager
def _replaced(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
