"""Hidden states -> scores: the formula of each kind of head, in float32, a row with the same bits beside any others.

"scalar" is a chain of linear layers with ReLU between; "logit" one vocabulary row of a language model's head.

Process reward models give a probability. "probability" is the sigmoid of a scalar; "two_labels" and "two_logits" are
the softmax of two, which is the sigmoid of their difference: the second label's over the first one's, the good step's
row of the vocabulary over the bad one's.

"gating" is ArmoRM's (arXiv 2406.12845): attributes `r = W h` of the last token, weights `g = c softmax(MLP(p) / T)` of
the prompt's last token, score `sum(g * (r M))`. "quantile_gating" is QRM's (arXiv 2409.10164): each attribute is the
mean of its quantiles. Where ArmoRM's code gives the attributes before the matrix M, QRM's gives them behind it.

"weighted" is URM's (arXiv 2410.00847): the head gives mean and spread of each attribute in turn, a SELU network of the
same token the weights, and the score is the weighted sum of the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import HeadConfig
from serve_app.reward_model.errors import TokenIdsError
from serve_app.reward_model.head_weights import HeadWeights, LinearWeights, NormWeights
from serve_app.reward_model.invariance import RowRule
from serve_app.reward_model.linear import Linear, linear_for, rowwise_, with_tiles

ROW_MULTIPLE = 16
"""Rows of a matrix that the products of `linear.py` want a multiple of; zero rows fill up."""
NORM_EPS = 1e-5
SIGMOID_WIDTH = 32
"""Elements of a row that `rowwise_` wants a multiple of."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear layer of `size` rows, ready to run."""

    linear: Linear
    size: int

    @classmethod
    def of(cls, layer: LinearWeights, *, invariant: bool) -> _Product:
        size = len(layer.weight)
        lacking = -size % ROW_MULTIPLE
        weight = F.pad(layer.weight, (0, 0, 0, lacking)) if lacking else layer.weight
        bias = F.pad(layer.bias, (0, lacking)) if lacking and layer.bias is not None else layer.bias
        return cls(linear_for(weight, bias, invariant=invariant), size)

    def __call__(self, rows: Tensor) -> Tensor:
        values = self.linear(rows)
        return values if values.shape[1] == self.size else values[:, : self.size].contiguous()


class Head:
    """A head, ready to run. Shape legend: R rows read, H hidden, A attributes, L labels."""

    def __init__(self, config: HeadConfig, weights: HeadWeights, *, invariant: bool = True) -> None:
        def products(layers: Sequence[LinearWeights]) -> list[_Product]:
            return [_Product.of(layer, invariant=invariant) for layer in layers]

        self.config = config
        last = weights.layers[-1]
        self._rows_LH: Tensor | None = None if config.attributes else last.weight
        self._bias_L: Tensor | None = None if config.attributes else last.bias
        self._layers = products(weights.layers if config.attributes else weights.layers[:-1])
        self._gate = products(_folded(weights.gate, weights.norms))
        matrix = weights.transform
        self._transforms = [] if matrix is None else products([LinearWeights(matrix.t().contiguous())])
        self._logit_scale = weights.logit_scale

    @property
    def linears(self) -> list[Linear]:
        """Matrix products in float32."""
        return [product.linear for product in (*self._layers, *self._gate, *self._transforms)]

    def run_by(self, rule: RowRule) -> None:
        """Cut products by another rule from now on."""
        for products in (self._layers, self._gate, self._transforms):
            products[:] = [replace(each, linear=with_tiles(each.linear, rule.tile_rows)) for each in products]

    def tensors(self) -> tuple[object, ...]:
        """Every weight, in tensors and dataclasses of tensors."""
        kept = (self._rows_LH, self._bias_L, self._logit_scale)
        return (*self.linears, *(tensor for tensor in kept if tensor is not None))

    @property
    def num_reads(self) -> int:
        """Hidden states that one score is made of."""
        return 2 if self.config.gate_pattern else 1

    def read_positions(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Positions of the hidden states that a sequence's score is made of, the last token's last.

        Raises:
            TokenIdsError: the sequence has no place for the gate to read.
        """
        last = len(token_ids) - 1
        pattern = self.config.gate_pattern
        if not pattern:
            return (last,)
        size = len(pattern)
        for start in range(len(token_ids) - size, -1, -1):
            if token_ids[start] == pattern[0] and tuple(token_ids[start : start + size]) == pattern:
                return (start, last)
        raise TokenIdsError(
            f"the gate is read where the prompt ends, at the tokens {list(pattern)}, and the sequence has none of these"
        )

    def __call__(self, hidden_RH: Tensor) -> Tensor:
        """Scores in the first column, attributes behind: float32 [R / num_reads, 1 + A].

        Rows of one sequence stand together, in the order of `read_positions`.
        """
        rows_RH = hidden_RH.float()
        if self._rows_LH is None:
            return self._with_attributes(rows_RH)
        for layer in self._layers:
            rows_RH = F.relu_(layer(rows_RH))
        scores_R = self._label(rows_RH, 0)
        if self.config.kind == "two_labels":
            scores_R = self._label(rows_RH, 1) - scores_R
        elif self.config.kind == "two_logits":
            scores_R = scores_R - self._label(rows_RH, 1)
        if self.config.steps is not None:
            scores_R = _sigmoid(scores_R)
        return self._normalized(scores_R)[:, None]

    def _label(self, rows_RH: Tensor, label: int) -> Tensor:
        """What the last layer gives for a label: float32 [R]."""
        assert self._rows_LH is not None
        values_R = (rows_RH * self._rows_LH[label]).sum(dim=-1)
        return values_R if self._bias_L is None else values_R + self._bias_L[label]

    def _with_attributes(self, rows_RH: Tensor) -> Tensor:
        """Every row goes through every product, since few rows would not keep their bits; then those that count are
        taken."""
        attributes_RA, weights_RA = self._attributes(rows_RH), self._weights(rows_RH)
        given_RA = self._transforms[0](attributes_RA) if self._transforms else attributes_RA
        reads = self.num_reads
        prompts, lasts = slice(0, None, reads), slice(reads - 1, None, reads)
        scores = (weights_RA[prompts] * given_RA[lasts]).sum(dim=-1)
        shown = given_RA if self.config.kind == "quantile_gating" else attributes_RA
        return torch.cat([self._normalized(scores)[:, None], shown[lasts]], dim=1)

    def _attributes(self, rows_RH: Tensor) -> Tensor:
        """Attributes of every row: float32 [R, A]."""
        (layer,) = self._layers
        values = layer(rows_RH)
        if self.config.kind == "weighted":
            return values[:, ::2].contiguous()
        if self.config.kind == "quantile_gating":
            return values.view(len(values), len(self.config.attributes), -1).mean(dim=2)
        return values

    def _weights(self, rows_RH: Tensor) -> Tensor:
        """Weights of the attributes that every row would give: float32 [R, A]."""
        is_selu = self.config.kind == "weighted"
        for layer in self._gate[:-1]:
            rows_RH = layer(rows_RH)
            rows_RH = rowwise_(rows_RH, _selu_) if is_selu else F.relu_(rows_RH)
        logits_RA = self._gate[-1](rows_RH)
        if is_selu:
            return logits_RA
        weights_RA = torch.softmax(logits_RA / self.config.temperature, dim=1)
        return weights_RA if self._logit_scale is None else weights_RA * self._logit_scale

    def _normalized(self, scores: Tensor) -> Tensor:
        known = self.config.normalization
        if known is None or not self.config.normalize:
            return scores
        return (scores - known.mean) / known.std


def _sigmoid(values_R: Tensor) -> Tensor:
    """The logistic of each value, each repeated so that none is in a row with others: see `rowwise_`."""
    return rowwise_(values_R[:, None].repeat(1, SIGMOID_WIDTH), torch.sigmoid_)[:, 0]


def _selu_(rows: Tensor) -> Tensor:
    return F.selu(rows, inplace=True)


def _folded(layers: Sequence[LinearWeights], norms: Sequence[NormWeights]) -> list[LinearWeights]:
    """The same network without batch norms: each is taken into the linear layer behind it, in float64."""
    folded = list(layers)
    for place, norm in enumerate(norms, start=1):
        factor = norm.weight.double() / (norm.var.double() + NORM_EPS).sqrt()
        shift = norm.bias.double() - norm.mean.double() * factor
        layer = layers[place]
        weight = layer.weight.double()
        bias = weight @ shift + (0.0 if layer.bias is None else layer.bias.double())
        folded[place] = LinearWeights((weight * factor).float(), bias.float())
    return folded
