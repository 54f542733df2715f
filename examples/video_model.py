"""A video classifier: an image network with five levels of feature maps and a recurrent head on each.

Source: Ballas, Yao, Pal, Courville, "Delving Deeper into Convolutional Networks for Learning Video Representations",
ICLR 2016, arXiv 1511.06432.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import convrnn
from examples.training import UserError

__all__ = ["BACKBONES", "RNNS", "ModelConfig", "VideoClassifier"]

RNNS = ("gru_rcn", "min_conv2d_gru")
BACKBONES = ("small", "vgg16")


@dataclass(frozen=True)
class ModelConfig:
    """What a VideoClassifier is made of; `frozen` keeps the backbone's weights as they are."""

    classes: int
    rnn: str = "gru_rcn"
    bidirectional: bool = False
    backbone: str = "small"
    frozen: bool = False
    dropout: float = 0.0


class SmallBackbone(nn.Module):
    """Five 3x3 convolutions, each halving the map: (N, 3, H, W) -> maps of H/2, H/4, ..., H/32."""

    channels = (16, 24, 32, 48, 64)
    hidden = (16, 24, 32, 32, 32)
    kernels = (3, 3, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip((3, *self.channels), self.channels, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


class VGG16Backbone(nn.Module):
    """The paper's maps: VGG-16's pool2 to pool5 and fc-7, the last as a 1x1 map; (N, 3, 224, 224) in the paper."""

    channels = (128, 256, 512, 512, 4096)
    hidden = (64, 128, 256, 256, 512)
    kernels = (3, 3, 3, 3, 1)

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        try:
            from torchvision.models import vgg16
        # A torchvision built for another PyTorch fails at import too, by what it cannot find.
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                "--backbone vgg16 needs torchvision: install the torchvision of your PyTorch's build, "
                f"or take --backbone small ({error})"
            ) from error
        vgg = vgg16(weights=None, init_weights=weights is None)
        if weights is not None:
            if not weights.is_file():
                raise UserError(f"there is no file --weights {weights}")
            try:
                vgg.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            # What torch.load raises for a file of another kind depends on the bytes it meets.
            except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__} {error}".splitlines()[0]
                raise UserError(f"--weights {weights} is not a state_dict of torchvision's VGG-16: {reason}") from error
        self.levels = nn.ModuleList(vgg.features[i:j] for i, j in ((0, 10), (10, 17), (17, 24), (24, 31)))
        self.fc7 = nn.Sequential(vgg.avgpool, nn.Flatten(), *vgg.classifier[:5])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return [*maps, self.fc7(x)[:, :, None, None]]


class RecurrentHead(nn.Module):
    """Reads one level's maps (B, T, C, H, W) in order and returns logits (B, classes)."""

    def __init__(self, config: ModelConfig, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        if config.rnn == "gru_rcn":
            self.rnn: nn.Module = convrnn.GRU_RCN(channels, hidden, kernel, bias=True)
        else:
            self.rnn = convrnn.MinConv2dGRU(channels, hidden, kernel, paddings=kernel // 2)
        self.bidirectional = config.bidirectional
        if self.bidirectional:
            self.rnn = convrnn.Bidirectional(self.rnn)
        features = hidden * 2 if self.bidirectional else hidden
        self.classify = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, config.classes))

    def forward(self, maps: Tensor) -> Tensor:
        out, _ = self.rnn(maps)
        last = out[:, -1]
        if self.bidirectional:
            # The backward half has seen the whole clip at the first frame, the forward half at the last.
            forward, _ = last.chunk(2, dim=1)
            _, backward = out[:, 0].chunk(2, dim=1)
            last = torch.cat((forward, backward), dim=1)
        return self.classify(last.mean(dim=(2, 3)))


class VideoClassifier(nn.Module):
    """Class logits (B, classes) of RGB clips (B, T, 3, H, W) uint8: the mean over the levels' heads.

    Args:
        config: what to build.
        weights: file with a state_dict of torchvision's VGG-16, for the backbone "vgg16" only; None: random weights.
    """

    def __init__(self, config: ModelConfig, weights: Path | None = None) -> None:
        super().__init__()
        self.frozen = config.frozen
        self.backbone = SmallBackbone() if config.backbone == "small" else VGG16Backbone(weights)
        self.backbone.requires_grad_(not config.frozen)
        levels = zip(self.backbone.channels, self.backbone.hidden, self.backbone.kernels, strict=True)
        self.heads = nn.ModuleList(RecurrentHead(config, *level) for level in levels)
        # ImageNet's statistics: what VGG-16 was trained with, and as good as any for the small backbone.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "VideoClassifier":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, clips: Tensor) -> Tensor:
        x = (clips.flatten(0, 1).float() / 255 - self.mean) / self.std
        maps = self.backbone(x)
        logits = [head(m.unflatten(0, clips.shape[:2])) for head, m in zip(self.heads, maps, strict=True)]
        return torch.stack(logits).mean(dim=0)
