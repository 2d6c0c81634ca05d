"""Networks for small images: convolutional ones with BatchNorm, and a vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_image_model(name: str, channels: int, classes: int, side: int = 32) -> nn.Module:
    """Return the network `name` for images of `channels` channels, randomly initialized.

    Args:
        side: height and width in pixels; the convolutional networks take any.
    """
    if name == "vit":
        return VisionTransformer(channels, classes, side)
    if name == "cnn":
        return SmallCNN(channels, classes)
    blocks, widths = _RESNETS[name]
    return ResNet(blocks, widths, channels, classes)


# name: (residual blocks in each stage, width of each stage)
_RESNETS = {
    "resnet8": (1, (16, 32, 64)),
    "resnet20": (3, (16, 32, 64)),
    "resnet18": (2, (64, 128, 256, 512)),
}


class SmallCNN(nn.Sequential):
    """Three convolutions, global average pooling and a linear classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            *_conv_bn_relu(channels, 48),
            *_conv_bn_relu(48, 96, stride=2),
            *_conv_bn_relu(96, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, classes),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the first may halve the resolution."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn_relu(in_width, width, stride),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_width, H, W] to [B, width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Residual network with the 3x3 stem for small images (He et al. 2016, section 4.2).

    Stages after the first halve the resolution. Three stages of n blocks make 6n + 2 layers.
    """

    def __init__(self, blocks: int, widths: tuple[int, ...], channels: int, classes: int) -> None:
        layers: list[nn.Module] = [*_conv_bn_relu(channels, widths[0])]
        in_width = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(in_width, width, stride))
                in_width = width
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_width, classes)
        )


def _conv_bn_relu(in_width: int, width: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each after LayerNorm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).transpose(1, 3)
        query, key, value = heads.unbind(2)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, tokens, width))
        mapped: Tensor = self.mlp(self.norm2(x))
        return x + mapped


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al. 2021): 8 x 8 patches as tokens, the mean of which classifies.

    No BatchNorm anywhere, so a subset of a batch is normalized as the batch is.
    """

    def __init__(
        self, channels: int, classes: int, side: int, width: int = 128, depth: int = 6
    ) -> None:
        super().__init__()
        patch = side // 8
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.empty(1, 64, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=4) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, side, side] to [B, classes]."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits
