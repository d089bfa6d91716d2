"""The 18-layer residual network for small images, in its original and its pre-activation form."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from blockprop.models.arguments import check_dropout, check_sizes


def resnet18(
    in_channels: int = 3,
    classes: int = 10,
    *,
    width: int = 64,
    preactivation: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Make a ResNet-18 from images [N, in_channels, H, W], at least 8 x 8, to outputs [N, classes].

    It starts with a 3 x 3 convolution and no max-pooling, as suits images of about 32 x 32. Its children are
    ``stem``, the eight residual blocks ``layer1_1``, ``layer1_2``, ``layer2_1``, ... ``layer4_2``, and
    ``head``. Convolutions have Kaiming initialisation.

    Args:
        in_channels: Channels of the images.
        classes: Number of outputs.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
        preactivation: Whether normalisation and ReLU come before each convolution instead of after it.
        dropout: Probability of zeroing a feature before the last Linear in training, in [0, 1); at 0 there is
            no such module.

    Raises:
        ValueError: If a size is below 1 or ``dropout`` is outside [0, 1).

    >>> [name for name, _ in resnet18(width=4).named_children()][:4]
    ['stem', 'layer1_1', 'layer1_2', 'layer2_1']
    """
    check_sizes(in_channels=in_channels, classes=classes, width=width)
    check_dropout(dropout)
    block = PreactivationBlock if preactivation else BasicBlock
    stem: OrderedDict[str, nn.Module] = OrderedDict(convolution=_convolution(in_channels, width))
    head: OrderedDict[str, nn.Module] = OrderedDict()
    # A pre-activation block normalises what it reads, and so leaves the last sum to the head.
    (head if preactivation else stem).update(norm=nn.BatchNorm2d(8 * width if preactivation else width), relu=nn.ReLU())
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    channels = width
    for stage in range(1, 5):
        for position in (1, 2):
            stride = 2 if stage > 1 and position == 1 else 1
            layers[f"layer{stage}_{position}"] = block(channels, channels * stride, stride)
            channels *= stride
    head.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    if dropout > 0:
        head["dropout"] = nn.Dropout(dropout)
    head["linear"] = nn.Linear(channels, classes)
    layers["head"] = nn.Sequential(head)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two convolutions around a shortcut: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))).

    Args:
        in_channels: Channels of the input [N, in_channels, H, W].
        out_channels: Channels of the output [N, out_channels, H / stride, W / stride].
        stride: Step of the first convolution. The shortcut is a 1 x 1 convolution with a normalisation where
            the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = _convolution(in_channels, out_channels, stride=stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.convolution2 = _convolution(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if (in_channels, 1) != (out_channels, stride):
            self.shortcut.append(_convolution(in_channels, out_channels, size=1, stride=stride))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """Map features [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        hidden = functional.relu(self.norm1(self.convolution1(images)))
        residual: Tensor = self.norm2(self.convolution2(hidden))
        return functional.relu(self.shortcut(images) + residual)


class PreactivationBlock(nn.Module):
    """Two convolutions beside a shortcut: shortcut(x) + conv(relu(norm(conv(relu(norm(x)))))).

    Args:
        in_channels: Channels of the input [N, in_channels, H, W].
        out_channels: Channels of the output [N, out_channels, H / stride, W / stride].
        stride: Step of the first convolution. Where the shape changes, the shortcut is a 1 x 1 convolution of
            the activated input, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.convolution1 = _convolution(in_channels, out_channels, stride=stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.convolution2 = _convolution(out_channels, out_channels)
        self.projection: nn.Conv2d | None = None
        if (in_channels, 1) != (out_channels, stride):
            self.projection = _convolution(in_channels, out_channels, size=1, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map features [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        active = functional.relu(self.norm1(images))
        shortcut = images if self.projection is None else self.projection(active)
        hidden = functional.relu(self.norm2(self.convolution1(active)))
        residual: Tensor = self.convolution2(hidden)
        return residual + shortcut


def _convolution(in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    # Without bias, because a normalisation follows every one of them.
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
