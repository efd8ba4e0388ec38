"""The limit that rollouts are compared with: GPT-2 written out for one batch, nothing around it.

No requests, no server, no limit but the kernels. All lengths are known, so rows are sorted by them: those that end are
the last, and what is left is a view. Nothing here is the engine's, so that neither can hide a mistake of the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from tests.benchmarks import onednn
from tests.benchmarks.roofline import fastest

_CONVOLVED_ROWS = (4, 8, 16, 24, 32, 40, 48, 56, 64)
_LINEAR = torch.tensor(2 * math.sqrt(2 / math.pi))


class BareLoop:
    """Completes `rows` prompts of `prompt_tokens` tokens at once, with copies of the weights in oneDNN's orders."""

    def __init__(self, model: GPT2LMHeadModel, *, rows: int, prompt_tokens: int, most_new_tokens: int) -> None:
        config, weights = model.config, model.transformer
        self._heads, self._width = config.n_head, config.n_embd // config.n_head
        self._tokens, self._positions = weights.wte.weight.detach(), weights.wpe.weight.detach()
        self._layers = [_Layer(block, self._heads) for block in weights.h]
        self._final_norm = _norm(weights.ln_f)
        self._head = _Linear(model.lm_head.weight.detach(), None)
        self._cache = torch.empty(
            len(self._layers), 2, rows, self._heads, prompt_tokens + most_new_tokens, self._width
        ).zero_()  # touched now, or the first rollout would pay for the pages

    @torch.inference_mode()
    def complete(
        self, prompts: Tensor, lengths: Sequence[int], uniforms: Tensor | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and their log-probabilities, by row: `lengths[row]` tokens after prompts [rows, prompt tokens].

        uniforms: [rows, longest] in [0, 1), from which tokens are drawn; None = the most likely token.
        """
        order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        logprobs = torch.zeros(tokens.shape)
        hidden = self._read(prompts[order])
        drawn = uniforms[order] if uniforms is not None else None
        for step in range(max(lengths)):
            alive = sum(length > step for length in lengths)
            logits = self._head(self._final_norm(hidden[:alive]))
            chosen, logprob = _choose(logits, drawn[:alive, step] if drawn is not None else None)
            tokens[:alive, step], logprobs[:alive, step] = chosen, logprob
            alive = sum(length > step + 1 for length in lengths)
            if alive:
                hidden = self._step(chosen[:alive], prompts.shape[1] + step)
        place = {row: at for at, row in enumerate(order)}
        return (
            [tokens[place[row], :length].tolist() for row, length in enumerate(lengths)],
            [logprobs[place[row], :length].tolist() for row, length in enumerate(lengths)],
        )

    def _read(self, prompts: Tensor) -> Tensor:
        """The last hidden state of each prompt: [rows, model width]."""
        rows, count = prompts.shape

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (
                each.view(rows, count, self._heads, self._width).transpose(1, 2) for each in (query, key, value)
            )
            self._cache[layer, 0, :, :, :count], self._cache[layer, 1, :, :, :count] = key, value
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
            return attended.transpose(1, 2).reshape(rows * count, -1)

        hidden = (self._tokens[prompts] + self._positions[:count]).view(rows * count, -1)
        return self._through(hidden, attend).view(rows, count, -1)[:, -1]

    def _step(self, tokens: Tensor, position: int) -> Tensor:
        rows = len(tokens)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = (each[:rows, :, : position + 1] for each in self._cache[layer])
            keys[:, :, position], values[:, :, position] = key, value
            weights = torch.softmax(query.unsqueeze(2) @ keys.transpose(2, 3), dim=-1)
            return (weights @ values).view(rows, -1)

        return self._through(self._tokens[tokens] + self._positions[position], attend)

    def _through(self, hidden: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        for number, layer in enumerate(self._layers):
            mixed = layer.mix(layer.first_norm(hidden)).view(len(hidden), 3, self._heads, self._width)
            hidden = hidden + layer.out(attend(number, *mixed.unbind(1)))
            hidden = hidden + layer.down(_gelu(layer.up(layer.second_norm(hidden))))
        return hidden


class _Layer:
    def __init__(self, block: Any, heads: int) -> None:
        attention, mlp = block.attn, block.mlp
        self.first_norm, self.second_norm = _norm(block.ln_1), _norm(block.ln_2)
        weight, bias = attention.c_attn.weight.detach().t().clone(), attention.c_attn.bias.detach().clone()
        width = weight.shape[1]
        for queries in (weight[:width], bias[:width]):
            queries.mul_((width // heads) ** -0.5)  # attention needs no scaling then
        self.mix = _Linear(weight, bias)
        self.out, self.up, self.down = (
            _Linear(linear.weight.detach().t(), linear.bias.detach())
            for linear in (attention.c_proj, mlp.c_fc, mlp.c_proj)
        )


class _Linear:
    """Rows by one weight [out, in], with whichever of oneDNN's kernels is faster for so many rows on this machine."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.contiguous()
        self._bias = bias
        self._plain = onednn.packed_for_linear(weight)
        orders: dict[bytes, Tensor] = {}  # most numbers of rows share one
        self._convolved: dict[int, Tensor] = {}
        for rows in _CONVOLVED_ROWS:
            if _convolution_is_faster(*weight.shape, rows):
                packed = onednn.packed_for_convolution(weight, rows)
                self._convolved[rows] = orders.setdefault(onednn.content(packed), packed)

    def __call__(self, inputs: Tensor) -> Tensor:
        if len(inputs) <= _CONVOLVED_ROWS[-1]:
            rows = _CONVOLVED_ROWS[bisect_left(_CONVOLVED_ROWS, len(inputs))]
            if rows in self._convolved:
                return onednn.convolution(inputs, self._convolved[rows], self._bias, rows)
        return onednn.linear(inputs, self._plain, self._bias)


@cache
@torch.inference_mode()
def _convolution_is_faster(out_features: int, in_features: int, rows: int) -> bool:
    weight, inputs = torch.rand(out_features, in_features), torch.rand(rows, in_features)
    plain, convolved = onednn.packed_for_linear(weight), onednn.packed_for_convolution(weight, rows)
    linear, convolution = fastest(
        partial(onednn.linear, inputs, plain, None),
        partial(onednn.convolution, inputs, convolved, None, rows),
    )
    return convolution < linear


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return lambda hidden: torch.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)


def _gelu(inputs: Tensor) -> Tensor:
    """x/2 · (1 + tanh u) as x · sigmoid(2u): torch's own takes twice as long for many rows."""
    factor = torch.addcmul(_LINEAR, inputs, inputs, value=0.044715 * float(_LINEAR))
    return factor.mul_(inputs).sigmoid_().mul_(inputs)


def _choose(logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of logits [rows, vocab], by the inverse of the distribution function."""
    if uniform is None:
        tokens = logits.argmax(dim=-1)
    probabilities = torch.softmax(logits, dim=-1)
    if uniform is not None:
        cumulative = probabilities.cumsum(dim=-1)
        target = uniform.unsqueeze(-1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()
