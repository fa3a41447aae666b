"""Segment pictures with frozen patch features and one linear layer, on drawn scenes of shapes.

    python examples/segment.py runs/shapes

MODEL is a run's folder or the Hub id of an I-JEPA encoder. Each patch's feature becomes one logit a class; these are
enlarged to pixels. The same layer on the same network with new weights, and the background everywhere, stand beside
it: without them a number says little.
"""

import argparse

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from ijepa_hf.data.sources.shapes import SHAPE_KINDS, draw_shape_scene
from ijepa_hf.data.transforms import normalize

parser = argparse.ArgumentParser(description="Segment drawn shapes with frozen patch features.")
parser.add_argument("model")
parser.add_argument("--num_train", type=int, default=1000)
parser.add_argument("--num_test", type=int, default=300)
parser.add_argument("--steps", type=int, default=500)
arguments = parser.parse_args()

MEAN, STD, BATCH = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64  # the defaults of a run
NUM_CLASSES = 1 + len(SHAPE_KINDS)  # 0 is the background
config = AutoConfig.from_pretrained(arguments.model)
side, patch = config.image_size, config.patch_size


def draw_scenes(seed, count):
    """Pixels [n, 3, side, side] and what is at each of them [n, side, side]."""
    scenes = [draw_shape_scene(seed, index, side) for index in range(count)]
    pictures = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2)
    return normalize(pictures, MEAN, STD), torch.from_numpy(np.stack([scene.segmentation for scene in scenes])).long()


@torch.no_grad()
def patch_features(encoder, pixels):
    """Features [n, D, rows, columns] of each patch: the image's layout is that of the patches, row by row."""
    parts = [encoder(part).last_hidden_state for part in pixels.split(BATCH)]
    return torch.cat(parts).transpose(1, 2).unflatten(2, (side // patch, side // patch))


def mean_iou(predicted, true):
    """Intersection over union, the mean over the classes; pixels of all pictures are counted together."""
    pairs = torch.bincount((true * NUM_CLASSES + predicted).flatten(), minlength=NUM_CLASSES**2)
    counts = pairs.view(NUM_CLASSES, NUM_CLASSES).double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return (counts.diag() / union)[union > 0].mean().item()


def score(encoder, train, test):
    """MIoU on the test scenes of a linear layer trained on the features of the others."""
    features, held_out = patch_features(encoder.eval(), train[0]), patch_features(encoder, test[0])
    mean, std = features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True) + 1e-6
    torch.manual_seed(0)
    head = torch.nn.Conv2d(features.shape[1], NUM_CLASSES, kernel_size=1)  # a linear layer, patch by patch
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(arguments.steps):
        chosen = torch.randint(len(features), (BATCH,))
        logits = functional.interpolate(head((features[chosen] - mean) / std), size=(side, side), mode="bilinear")
        functional.cross_entropy(logits, train[1][chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = functional.interpolate(head((held_out - mean) / std), size=(side, side), mode="bilinear")
    return mean_iou(logits.argmax(1), test[1])


train, test = draw_scenes(0, arguments.num_train), draw_scenes(1, arguments.num_test)
torch.manual_seed(0)
print(f"trained encoder    mIoU {100 * score(AutoModel.from_pretrained(arguments.model), train, test):.1f} %")
print(f"new weights        mIoU {100 * score(AutoModel.from_config(config), train, test):.1f} %")
print(f"background alone   mIoU {100 * mean_iou(torch.zeros_like(test[1]), test[1]):.1f} %")
