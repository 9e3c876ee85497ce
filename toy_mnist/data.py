"""Color-MNIST: an MNIST digit in one uniformly drawn hue on black, values in [-1, 1], its class as condition."""

import os
from pathlib import Path

import torch

import ladd

HUE_BINS = 36


def hue_to_rgb(hue):
    """Fully saturated colour of hue in [0, 1): [B] -> [B, 3] in [0, 1] (HSV with S = V = 1)."""
    k = (torch.tensor([0.0, 4.0, 2.0], device=hue.device) + 6 * hue[:, None]) % 6
    return ((k - 3).abs() - 1).clamp(0, 1)


def rgb_to_hue(rgb):
    """Hue in [0, 1) of colours [..., 3]; 0 for greys."""
    r, g, b = rgb.unbind(-1)
    high, low = rgb.amax(-1), rgb.amin(-1)
    span = (high - low).clamp(min=1e-8)
    h = torch.where(high == r, (g - b) / span % 6, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return torch.where(high - low < 1e-6, torch.zeros_like(h), h % 1)


def colour(grey, hue):
    """Grey digits [B, 28, 28] in [0, 1] painted in hue [B] on black: [B, 3, 28, 28] in [-1, 1]."""
    return grey[:, None] * hue_to_rgb(hue)[:, :, None, None] * 2 - 1


def image_hue(x):
    """The hue of each image [B, 3, 28, 28] in [-1, 1]: that of its pixels' mean colour, weighted by brightness. [B]"""
    v = (x.clamp(-1, 1) + 1) / 2
    weight = v.amax(1, keepdim=True)                                        # black ground counts for nothing
    return rgb_to_hue((v * weight).sum((2, 3)))


def load_mnist(root=None, train=True):
    """MNIST by torchvision: grey [N, 28, 28] uint8 and labels [N]. root: a folder, else LADD_DATA, else ./data (download).

    Raises ladd.UserError that names --data-root and LADD_DATA where MNIST is neither found nor can be downloaded.
    """
    from torchvision.datasets import MNIST
    given = root or os.environ.get("LADD_DATA")
    try:
        data = MNIST(given or "data", train=train, download=not given)
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, ... here: one line serves for all
        raise ladd.UserError(f"MNIST was not found in {Path(given or 'data').resolve()} and could not be downloaded "
                             f"({str(error).splitlines()[0][:120]}): name its folder by --data-root DIR or LADD_DATA=DIR "
                             f"(the folder that holds MNIST/raw)") from error
    return data.data, data.targets


class ColorMNIST:
    """Grey digits [N, 28, 28] uint8 and labels [N]; each is painted anew every epoch, in a hue keyed by (seed, epoch, index)."""

    def __init__(self, grey, label, seed=0):
        self.grey, self.label, self.seed = grey.float() / 255, label.long(), seed

    def __len__(self):
        return len(self.grey)

    def hues(self, epoch=0):
        """The hue in [0, 1) of every digit in one epoch. [N]"""
        return torch.rand(len(self), generator=ladd.generator(self.seed, epoch, "hue"))

    def batch(self, index, epoch):
        """index [B], epoch [B] (as `ladd.reader_indices` gives them) -> x0 [B, 3, 28, 28] in [-1, 1], label [B]."""
        hue = torch.empty(len(index))
        for e in epoch.unique().tolist():
            hue[epoch == e] = self.hues(e)[index[epoch == e]]
        return colour(self.grey[index], hue), self.label[index]
