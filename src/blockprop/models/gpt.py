"""A small decoder-only transformer for language modelling."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from blockprop.models.arguments import check_dropout, check_sizes


def gpt(
    vocabulary: int,
    *,
    context: int = 64,
    width: int = 96,
    depth: int = 6,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Make a decoder-only transformer from tokens int64 [N, T] to logits [N, T, vocabulary], T <= context.

    The logits at position t depend on the tokens up to t alone. Its children are ``embed``, the pre-LayerNorm
    blocks ``block1``, ``block2``, ..., each of an ``attention`` and a ``perceptron``, and ``head``.
    `torch.nn.CrossEntropyLoss` wants the classes in dimension 1, so move them there first:
    ``loss(logits.movedim(-1, 1), targets)``.

    Args:
        vocabulary: Number of different tokens.
        context: Length of the longest input.
        width: Features of each token, divisible by ``heads``.
        depth: Number of blocks.
        heads: Attention heads of each block; ``width // 32``, at least 1, unless told.
        dropout: Probability of zeroing in training, in the embedding, the attention and both branches of each
            block, in [0, 1).

    Raises:
        ValueError: If a size is below 1, ``width`` is not divisible by ``heads`` or ``dropout`` is outside
            [0, 1).

    >>> import torch
    >>> gpt(65, context=16, width=32, depth=2)(torch.zeros(3, 16, dtype=torch.long)).shape
    torch.Size([3, 16, 65])
    """
    check_sizes(vocabulary=vocabulary, context=context, width=width, depth=depth)
    heads = max(1, width // 32) if heads is None else heads
    check_sizes(heads=heads)
    check_dropout(dropout)
    if width % heads:
        raise ValueError(
            f"width {width} is not divisible by {heads} heads; expected a multiple: "
            f"take for example a width of {heads * (width // heads + 1)}"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Embedding(vocabulary, context, width, dropout))
    for index in range(1, depth + 1):
        layers[f"block{index}"] = decoder_block(width, heads, dropout)
    layers["head"] = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), linear=nn.Linear(width, vocabulary)))
    model = nn.Sequential(layers)
    _initialise(model, depth)
    return model


class Embedding(nn.Module):
    """The sum of a learned vector for each token and one for its position.

    Args:
        vocabulary: Number of different tokens.
        context: Number of positions.
        width: Length of each vector.
        dropout: Probability of zeroing in training.
    """

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [N, T] to features [N, T, width].

        Raises:
            ValueError: If T exceeds the context.
        """
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(
                f"the input has {length} tokens but the model's context is {self.position.num_embeddings}; "
                f"expected no more: cut the input, or build the model with a larger context"
            )
        embedded: Tensor = self.dropout(self.token(tokens) + self.position.weight[:length])
        return embedded


def decoder_block(width: int, heads: int, dropout: float) -> nn.Sequential:
    """Causal self-attention, then a two-layer perceptron: two children, so that a network may be cut between them.

    Args:
        width: Features of each token, divisible by ``heads``.
        heads: Number of attention heads.
        dropout: Probability of zeroing in training.
    """
    attention = CausalAttention(width, heads, dropout)
    perceptron = nn.Sequential(
        OrderedDict(
            expand=nn.Linear(width, 4 * width),
            gelu=nn.GELU(),
            contract=nn.Linear(4 * width, width),
            dropout=nn.Dropout(dropout),
        )
    )
    return nn.Sequential(OrderedDict(attention=Residual(width, attention), perceptron=Residual(width, perceptron)))


class Residual(nn.Module):
    """A branch, normalised first and added to what it read.

    Args:
        width: Features of each token.
        branch: From features to features.
    """

    def __init__(self, width: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = branch

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, T, width] to features of the same shape."""
        rewritten: Tensor = self.branch(self.norm(features))
        return features + rewritten


class CausalAttention(nn.Module):
    """Self-attention of each position to itself and those before it.

    Args:
        width: Features of each token, divisible by ``heads``.
        heads: Number of attention heads.
        dropout: Probability of zeroing in training, of attention weights and of outputs.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.contract = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, T, width] to features of the same shape."""
        split = self.project(features).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.movedim(2, 0).transpose(-3, -2)
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout.p if self.training else 0.0, is_causal=True
        )
        mixed: Tensor = self.dropout(self.contract(attended.transpose(-3, -2).flatten(-2)))
        return mixed


def _initialise(model: nn.Sequential, depth: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            # The 2 * depth branches add up, so each starts smaller to keep the sum's variance.
            branch_end = name.endswith("contract")
            nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if branch_end else 0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
