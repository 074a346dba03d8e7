# SPDX-License-Identifier: Apache-2.0
"""``patch``: our norms and our loss inside models of transformers that have the pattern they fuse.

A patched module keeps its class, its parameters and its hooks; only its ``forward`` is another, put on the
instance. A call that is fused passes by the modules whose weights it reads. So it looks each time whether
they are what they were: where somebody listens, or has put an adapter there, they are called one by one.

Layers are patched one by one: the end of the first branch and the norm before the second are one call, the
end of the second branch is another. Joining that with the first norm of the *next* layer, as CogView does,
would save one more pass over memory, but a layer would then read its neighbour's weights, which FSDP does not
allow for.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from cogview_kernels import _checks, rms_norm, sandwich_rms_norm
from cogview_kernels import linear_cross_entropy as fused_cross_entropy
from cogview_kernels._hooks import is_unmodified

Forward = Callable[..., Any]
_RETURN = re.compile(r"return (\w+)\(\s*loss=loss,")  # of a head: the class of its output


@dataclass(frozen=True)
class _Norm:
    """A kind of RMSNorm: a line of its source by which it is known, and what it is as ``rms_norm``."""

    formula: str
    eps: str  # the attribute that holds it
    weight_offset: float = 0.0
    round_before_weight: bool = False

    def options(self, norm: nn.Module) -> dict[str, Any]:
        return {
            "eps": getattr(norm, self.eps),
            "weight_offset": self.weight_offset,
            "round_before_weight": self.round_before_weight,
        }


@dataclass(frozen=True)
class _Family:
    """One kind of model: its classes, its kind of norm, and the norms of a layer.

    These are before attention, after it, before the MLP and after it; None where there is none.
    """

    layer: str
    norm: str
    head: str
    kind: _Norm
    norms: tuple[str | None, str, str | None, str]

    @property
    def calls(self) -> str:
        """What a layer calls, in order; "+" is a residual sum."""
        pre_attention, post_attention, pre_mlp, post_mlp = self.norms
        order = (pre_attention, "self_attn", post_attention, "+", pre_mlp, "mlp", post_mlp, "+")
        return " ".join(name for name in order if name is not None)


_GEMMA = _Norm("output = output * (1.0 + self.weight.float())", "eps", weight_offset=1.0)
_GLM = _Norm(
    "return self.weight * hidden_states.to(input_dtype)", "variance_epsilon", round_before_weight=True
)
_OLMO = _Norm("return (self.weight * hidden_states).to(input_dtype)", "variance_epsilon")
_NORMS_OF_GEMMA = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_NORMS_OF_GLM = (
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)
_NORMS_OF_OLMO = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_FAMILIES = (
    _Family("Gemma2DecoderLayer", "Gemma2RMSNorm", "Gemma2ForCausalLM", _GEMMA, _NORMS_OF_GEMMA),
    _Family("Gemma3DecoderLayer", "Gemma3RMSNorm", "Gemma3ForCausalLM", _GEMMA, _NORMS_OF_GEMMA),
    _Family("Glm4DecoderLayer", "Glm4RMSNorm", "Glm4ForCausalLM", _GLM, _NORMS_OF_GLM),
    _Family(
        "GlmImageTextDecoderLayer",
        "GlmImageRMSNorm",
        "GlmImageForConditionalGeneration",
        _GLM,
        _NORMS_OF_GLM,
    ),
    _Family("Olmo2DecoderLayer", "Olmo2RMSNorm", "Olmo2ForCausalLM", _OLMO, _NORMS_OF_OLMO),
)


def patch(model: nn.Module, *, sandwich_norm: bool = True, linear_cross_entropy: bool = True) -> None:
    """Puts our norms and our loss into a Gemma 2 or 3, GLM-4, GLM-Image or OLMo 2 of transformers, in place.

    The model computes the same, forward and backward, up to rounding: a sum that is fused is rounded once.

    Args:
        sandwich_norm: the layers' norms, with the residual sums between them, are
            :func:`cogview_kernels.sandwich_rms_norm`; all other RMSNorms of the model are
            :func:`cogview_kernels.rms_norm`.
        linear_cross_entropy: in training mode and with ``labels``, the loss is
            :func:`cogview_kernels.linear_cross_entropy`, and ``logits`` of the output are None: not having
            them is the point. It is computed from float32 sums, where the model rounds logits to its dtype.
            In evaluation mode, without labels, or where the head is no plain ``nn.Linear`` any more or has
            hooks, the model's own head runs.

    Raises:
        NotImplementedError: the model, or the source of its classes in the installed transformers, is not one
            that this function knows; the message names those. Nothing has been changed then.
        ValueError: the model is patched already, or something else has replaced a ``forward`` in it.
    """
    family = _family_of(model)
    forwards: dict[nn.Module, Forward] = {}
    if sandwich_norm:
        for module in model.modules():
            if type(module).__name__ == family.norm:
                _check_source(module, family.kind.formula in _source(module))
                forwards[module] = _norm_forward(family.kind)
            elif type(module).__name__ == family.layer:
                _check_source(module, _calls(module, family.calls) == family.calls)
                forwards[module] = _layer_forward(family)
    if linear_cross_entropy:
        _check_head(model, family)
        forwards[model] = _head_forward(_output_class(model), inspect.signature(type(model).forward))
    for module in forwards:
        if "forward" in vars(module):
            by = "patch; call unpatch first" if _is_ours(module) else "another library; call patch before it"
            raise ValueError(f"patch: forward of {type(module).__name__} was replaced by {by}")
    for module, forward in forwards.items():
        # A bound method, so that a deep copy of the model is bound to the copy's own modules.
        module.forward = MethodType(forward, module)


def unpatch(model: nn.Module) -> None:
    """Takes back what :func:`patch` did to the model; a model that was not patched stays as it is."""
    for module in model.modules():
        if _is_ours(module):
            del module.forward


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    # Other libraries wrap a method in something that copies its names.
    return isinstance(forward, MethodType) and forward.__func__.__module__ == __name__


def _is_known(module: nn.Module, family: _Family) -> bool:
    """Whether the weight of a norm may be read in place of a call."""
    return type(module).__name__ == family.norm and is_unmodified(module, _is_ours)


def _is_plain(head: nn.Module) -> bool:
    """Whether the weights of a head may be read in place of a call."""
    return type(head) is nn.Linear and type(head.weight) in _checks.PLAIN and is_unmodified(head, _is_ours)


def _family_of(model: nn.Module) -> _Family:
    layers = {family.layer: family for family in _FAMILIES}
    for module in model.modules():
        if type(module).__name__ in layers and type(module).__module__.startswith("transformers.models."):
            return layers[type(module).__name__]
    known = ", ".join(family.head.split("For")[0] for family in _FAMILIES)
    raise NotImplementedError(f"patch: {type(model).__name__} is not one of the models it knows: {known}")


def _check_source(module: nn.Module, as_known: bool) -> None:
    """An error where the installed transformers computes something else under a name that we know."""
    if not as_known:
        raise NotImplementedError(
            f"patch: {type(module).__name__} of transformers {transformers.__version__} is not written as in "
            "the versions that patch knows, 5.20 to 5.24; install one of those"
        )


def _check_head(model: Any, family: _Family) -> None:
    if type(model).__name__ != family.head:
        raise NotImplementedError(
            f"patch: linear_cross_entropy needs a {family.head}, got {type(model).__name__}; "
            "linear_cross_entropy=False patches the norms alone"
        )
    expected = "model lm_head loss_function"
    as_known = _calls(model, expected) == expected and _RETURN.search(_source(model)) is not None
    _check_source(model, as_known)
    if model.loss_function is not ForCausalLMLoss:
        raise NotImplementedError(
            "patch: linear_cross_entropy replaces ForCausalLMLoss of transformers, but this model's loss is "
            f"{model.loss_function}; pass linear_cross_entropy=False"
        )


def _source(module: nn.Module) -> str:
    return inspect.getsource(inspect.unwrap(type(module).forward))


def _calls(module: nn.Module, expected: str) -> str:
    """What the source of the module's ``forward`` calls of the names in ``expected``, in order."""
    names = "|".join(name for name in expected.split() if name != "+")
    found = re.finditer(rf"self\.({names})\(|residual \+ hidden_states", _source(module))
    return " ".join(match.group(1) or "+" for match in found)


def _widens(kind: _Norm, norm: Any, x: Tensor) -> bool:
    """Whether a float32 weight turns a result in 16 bits into float32: where it is multiplied last."""
    return kind.round_before_weight and norm.weight.dtype != x.dtype


def _norm_forward(kind: _Norm) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        if _widens(kind, self, x):
            return type(self).forward(self, x)
        return rms_norm(x, self.weight, **kind.options(self))

    return forward


def _layer_forward(family: _Family) -> Forward:
    pre_attention, post_attention, pre_mlp, post_mlp = family.norms
    kind = family.kind
    fused = [name for name in (post_attention, pre_mlp, post_mlp) if name is not None]

    def sandwich(self: Any, branch: Tensor, x: Tensor, post: str, pre: str | None) -> tuple[Tensor, Tensor]:
        post_norm = getattr(self, post)
        pre_weight = None if pre is None else getattr(self, pre).weight
        if _widens(kind, post_norm, branch):
            x = x.float()
        options = kind.options(post_norm)
        if _checks.is_autocast(branch.device):  # The products of the MLP would each make a copy in 16 bits.
            options["normed_dtype"] = branch.dtype
        x, normed = sandwich_rms_norm(branch, x, post_norm.weight, pre_weight, **options)
        return x, x if normed is None else normed

    def forward(self: Any, hidden_states: Tensor, **others: Any) -> Tensor:
        if not all(_is_known(getattr(self, name), family) for name in fused):
            return type(self).forward(self, hidden_states, **others)
        x = hidden_states
        normed = x if pre_attention is None else getattr(self, pre_attention)(x)
        branch, _ = self.self_attn(hidden_states=normed, **others)
        x, normed = sandwich(self, branch, x, post_attention, pre_mlp)
        return sandwich(self, self.mlp(normed), x, post_mlp, None)[0]

    return forward


def _output_class(model: nn.Module) -> Any:
    """What the model's ``forward`` returns; its name differs between versions."""
    found = _RETURN.search(_source(model))
    assert found is not None  # _check_head has looked
    return getattr(sys.modules[type(model).__module__], found.group(1))


def _head_forward(output: Any, signature: inspect.Signature) -> Forward:
    fields = {field.name for field in dataclasses.fields(output)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = type(self).forward
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        others = given.pop("kwargs", {})
        wants_tuple = others.get("return_dict", self.config.return_dict) is False
        kept = given.pop("logits_to_keep", 0)
        keeps_some = not (isinstance(kept, int) and kept == 0)
        if given.get("labels") is None or not self.training or keeps_some or wants_tuple:
            return original(self, *args, **kwargs)
        if self.loss_function is not ForCausalLMLoss or not _is_plain(self.lm_head):
            return original(self, *args, **kwargs)
        del given["self"]
        labels = given.pop("labels")
        outputs = self.model(**given, **others)
        softcap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        loss = _loss(self.lm_head, outputs.last_hidden_state, labels, softcap, others)
        rest = {name: value for name, value in outputs.items() if name in fields}
        return output(loss=loss, **rest)

    # Trainer and generate ask it which arguments the model takes.
    cast(Any, forward).__signature__ = signature
    return forward


def _loss(
    head: Any, hidden: Tensor, labels: Tensor, softcap: float | None, options: dict[str, Any]
) -> Tensor:
    """ForCausalLMLoss of ``head(hidden)``: each position predicts the label of the next."""
    ignore_index = options.get("ignore_index", -100)
    target = options.get("shift_labels")
    if target is None:
        target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    num_items = options.get("num_items_in_batch")
    loss = fused_cross_entropy(
        hidden,
        head.weight,
        target.to(hidden.device),
        bias=head.bias,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction="mean" if num_items is None else "sum",
    )
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)
