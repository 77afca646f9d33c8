"""Forward of a whole encoder on a CPU around its fused layers: no mask is built, no keyword sorted, if none is asked.

At one short sentence the layers take less time than what transformers does around them: wrappers that gather hidden
states, a four-dimensional mask, a second look at each argument. `FusedModel` goes straight from token ids and the
two-dimensional mask to the chunks of `qbert.inference.cpu.FusedEncoder`; any request that asks for more gets the
model's own forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.encoders.copied import CopiedParameters
from qbert.inference.cpu_layers import FusedEmbeddings, reason_not_to_fuse_embeddings
from qbert.inference.forward import FastForward, is_recording
from qbert.kernels.cpu.chains import compiled

logger = logging.getLogger(__name__)


class FusedModel(FastForward):
    """``forward`` of the base model of an encoder of the BERT kind (not a module: it adds nothing to the state).

    Args:
        base: model with ``embeddings``, and ``pooler`` or ``embeddings_project`` where its kind has it.
        run: (hidden states [B, T, H], lengths [B] or None) to the last hidden state [B, T, H].
        cross_attention: whether its kind can be a decoder too, and has outputs that say so.
    """

    own = ("base", "run", "_copied", "_asks")

    def __init__(self, base: Any, run: Callable[[Tensor, Tensor | None], Tensor], cross_attention: bool) -> None:
        self.base, self.run, self.cross_attention = base, run, cross_attention
        self.names = list(inspect.signature(type(base).forward).parameters)[1:]
        self.id_names = ["position_ids"]
        if hasattr(base.embeddings, "token_type_embeddings"):
            self.id_names.append("token_type_ids")
        reason = reason_not_to_fuse_embeddings(base.embeddings)
        if reason:
            logger.info("the embeddings of %s are not fused: %s", type(base).__name__, reason)
        self._embed = None if reason else compiled(FusedEmbeddings(base.embeddings))
        self._copied = CopiedParameters({} if reason else {"embeddings": base.embeddings})
        self._asks = Requests()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids and mask [B, T] to transformers' output, with ``last_hidden_state`` [B, T, H]."""
        base = self.base
        given = dict(zip(self.names, args, strict=False)) | kwargs
        input_ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
        ids = {name: given.pop(name) for name in self.id_names if name in given}
        padded_right, lengths = lengths_of(mask)
        if input_ids is None or not padded_right or not self._can_run(input_ids, mask, given):
            self._copied.doubt()
            return type(base).forward(base, *args, **kwargs)
        with torch.inference_mode():
            x = self._embedded(input_ids, **ids)
            if hasattr(base, "embeddings_project"):
                x = base.embeddings_project(x)
        return self._output(self.run(x, lengths))

    def _embedded(
        self, ids: Tensor, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        embeddings = self.base.embeddings
        if self._embed is not None and position_ids is None and embeddings.LayerNorm.weight.dtype == torch.float32:
            self._copied.check(ids.numel())
            try:
                return self._embed(ids, token_type_ids)  # type: ignore[no-any-return]
            except (RuntimeError, IndexError):
                pass  # an id outside its table, too many tokens: the model's own embeddings say so in their own way
        others = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        return embeddings(input_ids=ids, **{n: v for n, v in others.items() if v is not None})  # type: ignore[no-any-return]

    def _output(self, hidden: Tensor) -> Any:
        from transformers import modeling_outputs as outputs

        kind: Any
        crossed: Any
        if not hasattr(self.base, "pooler"):
            crossed, kind = outputs.BaseModelOutputWithPastAndCrossAttentions, outputs.BaseModelOutput
            return plain_output(crossed if self.cross_attention else kind, hidden)
        crossed, kind = outputs.BaseModelOutputWithPoolingAndCrossAttentions, outputs.BaseModelOutputWithPooling
        output = plain_output(crossed if self.cross_attention else kind, hidden)
        if self.base.pooler is not None:
            output["pooler_output"] = self.base.pooler(hidden)
        return output

    def _can_run(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        return (
            ids.device.type == "cpu"
            and is_plain_input(ids, mask, kwargs.pop("inputs_embeds", None))
            and self._asks.for_no_more(self.base, kwargs)
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self.base.parameters()))
        )


def is_plain_request(
    base: Any, ids: Tensor, mask: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether `base` is asked for no more than the last hidden state and the pooled output of token ids [B, T]."""
    return is_plain_input(ids, mask, embeds) and asks_for_no_more(base, kwargs)


def is_plain_input(ids: Tensor, mask: Tensor | None, embeds: Tensor | None) -> bool:
    """Whether inputs are token ids [B, T], at least one, and a mask of that shape or none."""
    return ids.dim() == 2 and ids.numel() > 0 and embeds is None and (mask is None or mask.shape == ids.shape)


def asks_for_no_more(base: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `kwargs`, what is left of a request, and the config want no more of `base` than hidden states at last."""
    from transformers.utils.output_capturing import _active_collector

    config = base.config
    return (
        (config.return_dict if kwargs.get("return_dict") is None else kwargs["return_dict"]) is True
        and not any(isinstance(v, Tensor) or bool(v) for k, v in kwargs.items() if k != "return_dict")
        and not (config.output_hidden_states or config.output_attentions)
        and not _active_collector.get()
        and not is_recording()
        and not base.training
    )


class Requests:
    """`asks_for_no_more`, faster: a config that has not changed is not asked again.

    To ask it for three values takes 5 microseconds, to see that it is the same one.
    """

    def __init__(self) -> None:
        from transformers.utils.output_capturing import _active_collector

        self._collector = _active_collector
        self._plain: tuple[Any, dict[str, Any]] = (None, {})  # a config, and what it held when it asked for no more

    def __deepcopy__(self, memo: dict[int, Any]) -> Requests:
        return Requests()

    def for_no_more(self, base: Any, kwargs: dict[str, Any]) -> bool:
        """As `asks_for_no_more`."""
        config, held = self._plain
        if (
            not is_recording()
            and base.config is config
            and object.__getattribute__(config, "__dict__") == held
            and not base.training
            and not self._collector.get()
            and all(value is None or value is (name == "return_dict") for name, value in kwargs.items())
        ):
            return True
        if not asks_for_no_more(base, kwargs):
            return False
        if asks_for_no_more(base, {}):
            self._plain = base.config, dict(object.__getattribute__(base.config, "__dict__"))
        return True


def plain_output(kind: Any, hidden: Tensor) -> Any:
    """kind(last_hidden_state=hidden), made as an instance that has one item: in a tenth of its constructor's time."""
    output = kind.__new__(kind)
    output["last_hidden_state"] = hidden
    return output


def lengths_of(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """(whether a mask [B, T] hides nothing but padding on the right, tokens in each sequence [B] if it hides any).

    A row of nothing but padding is none of that: what it attends to is left to the model.
    """
    if mask is None:
        return True, None
    if mask.dim() != 2 or mask.device.type != "cpu" or is_recording():
        return False, None
    if bool(mask.all()):
        return True, None
    lengths = tokens_before_padding(mask != 0)
    return lengths is not None, lengths


def tokens_before_padding(keep: Tensor) -> Tensor | None:
    """Tokens in each row [B], at least 1, if bool `keep` [B, T] hides nothing but padding on the right."""
    lengths = keep.sum(1)
    places = torch.arange(keep.shape[1], device=keep.device)
    return lengths if bool((lengths > 0).all()) and torch.equal(keep, places < lengths[:, None]) else None
