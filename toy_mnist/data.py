"""Color-MNIST: an MNIST digit in one random hue on black, in [-1, 1]. The condition: its class."""

import os
from pathlib import Path

import torch
from matplotlib.colors import rgb_to_hsv
from torchvision.datasets import MNIST

import ladd


def hue_to_rgb(hue):
    """The fully saturated colour of hue [B] in [0, 1): [B, 3] in [0, 1] (HSV with S = V = 1)."""
    k = (torch.tensor([0.0, 4.0, 2.0], device=hue.device) + 6 * hue[:, None]) % 6
    return ((k - 3).abs() - 1).clamp(0, 1)


def colour(grey, hue):
    """Grey digits [B, 28, 28] in [0, 1], painted in hue [B] on black: [B, 3, 28, 28] in [-1, 1]."""
    return grey[:, None] * hue_to_rgb(hue)[:, :, None, None] * 2 - 1


def image_hue(x):
    """The hue [B] of images [B, 3, 28, 28] in [-1, 1]: that of their mean colour.

    A pixel weighs as much as it is bright: the black ground counts for nothing."""
    v = (x.clamp(-1, 1) + 1) / 2
    mean = (v * v.amax(1, keepdim=True)).mean((2, 3))  # [B, 3]
    return torch.from_numpy(rgb_to_hsv(mean.numpy())[:, 0])


def load_mnist(root=None, train=True):
    """MNIST's grey digits [N, 28, 28] uint8 and labels [N], from the folder that holds MNIST/raw.

    root: that folder, else LADD_DATA, else ./data, into which it is downloaded."""
    given = root or os.environ.get("LADD_DATA")
    folder = Path(given or "data").expanduser()
    try:
        data = MNIST(folder, train=train, download=not given)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:  # also a damaged file
        raise ladd.UserError(
            f"MNIST is not in {folder.resolve()} ({' '.join(str(error).split())[:120]}): "
            "name the folder that holds MNIST/raw by --data-root DIR or LADD_DATA=DIR"
        ) from error
    return data.data, data.targets


class ColorMNIST:
    """Grey digits [N, 28, 28] uint8 and labels [N]. Each epoch paints every digit anew."""

    def __init__(self, grey, label, seed=0):
        self.grey, self.label = grey.float() / 255, label.long()
        self.seed = seed

    def __len__(self):
        return len(self.grey)

    def batch(self, index, epoch):
        """Digits index [B] as epoch (one, or [B]) paints them: x0 [B, 3, 28, 28], label [B]."""
        epoch = torch.as_tensor(epoch).expand(len(index))
        hue = torch.empty(len(index))
        for e in epoch.unique().tolist():
            hues = torch.rand(len(self), generator=ladd.generator(self.seed, e, "hue"))
            hue[epoch == e] = hues[index[epoch == e]]
        return colour(self.grey[index], hue), self.label[index]
