"""Encoder and predictor in plain PyTorch, with the published parameter names: a second opinion for tests.

Written from the description of the published code and from the paper (arXiv 2301.08243), for three uses: it makes
files of the published kind, it trains as the published code trains, and its own source, put at `src/models/
vision_transformer.py` of a folder, stands for a checkout of that code. So it imports nothing but torch, and takes the
published constructors' arguments. What it shares with this package is nothing but the method.
"""

import contextlib
import copy
import functools
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


def sincos_table(width, side):
    """[1, side * side, width]: column sines, column cosines, row sines, row cosines, in float64 until the end."""
    rates = torch.tensor([10000.0 ** (-4 * k / width) for k in range(width // 4)], dtype=torch.float64)
    rows = []
    for place in range(side * side):
        row, column = divmod(place, side)
        rows.append(torch.cat([turn(axis * rates) for axis in (column, row) for turn in (torch.sin, torch.cos)]))
    return torch.stack(rows)[None].float()


def pick(tokens, masks):
    """Tokens [B, N, D] at each mask's [B, K], one mask's images below the other's."""
    return torch.cat([torch.take_along_dim(tokens, mask[:, :, None], dim=1) for mask in masks])


class Attention(nn.Module):
    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, heads, mlp_ratio, qkv_bias, norm_layer):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = norm_layer(width)
        inner = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        side = img_size[0] // patch_size
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, side), requires_grad=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(
            [Layer(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer) for _ in range(depth)]
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, images, masks=None):
        x = self.patch_embed["proj"](images).flatten(2).mT + self.pos_embed
        x = x if masks is None else pick(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionTransformerPredictor(nn.Module):
    def __init__(
        self,
        num_patches,
        embed_dim,
        predictor_embed_dim,
        depth,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim))
        table = sincos_table(predictor_embed_dim, round(num_patches**0.5))
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.predictor_blocks = nn.ModuleList(
            [Layer(predictor_embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer) for _ in range(depth)]
        )
        self.predictor_norm = norm_layer(predictor_embed_dim)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)

    def forward(self, context, context_masks, target_masks):
        """One context set; rows of the first target block of all images, then of the second, ..."""
        images = len(context)
        table = self.predictor_pos_embed.expand(images, -1, -1)
        context = self.predictor_embed(context) + pick(table, context_masks)
        blocks = []
        for mask in target_masks:
            x = torch.cat([context, self.mask_token + pick(table, [mask])], dim=1)
            for block in self.predictor_blocks:
                x = block(x)
            blocks.append(self.predictor_proj(self.predictor_norm(x[:, -mask.shape[1] :])))
        return torch.cat(blocks)


# -- what is around the networks -------------------------------------------------------------------------------------

SMALL = {"image_size": 32, "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
SMALL_PREDICTOR = {"width": 16, "depth": 2}
TRAINING = {"learning_rate": 2e-3, "weight_decay": 0.05, "momentum": 0.9}


def make_networks(seed=0, encoder=SMALL, predictor=SMALL_PREDICTOR, device=None):
    """Encoder, predictor and target encoder, all weights random, so that nothing is equal by being zero."""

    def norm(width):
        return nn.LayerNorm(width, eps=1e-6)

    def draw(module, generator):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad and not parameter.is_meta:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.1 * drawn + (1.0 if parameter.ndim == 1 else 0.0))
        return module

    generator = torch.Generator().manual_seed(seed)
    patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
    with torch.device(device or "cpu"):
        context = VisionTransformer(
            [encoder["image_size"]],
            encoder["patch_size"],
            encoder["width"],
            encoder["depth"],
            encoder["heads"],
            norm_layer=norm,
        )
        narrow = VisionTransformerPredictor(
            patches,
            encoder["width"],
            predictor["width"],
            predictor["depth"],
            encoder["heads"],
            norm_layer=norm,
        )
    target = copy.deepcopy(context)
    networks = [draw(network, generator) for network in (context, narrow, target)]
    networks[2].requires_grad_(False)
    return networks


def make_adamw(encoder, predictor):
    """AdamW in four groups: decayed of both networks, then biases and vectors of both."""

    def chosen(network, vectors):
        named = network.named_parameters()
        return [value for name, value in named if (value.ndim == 1 or "bias" in name) == vectors]

    networks = (encoder, predictor)
    groups = [{"params": chosen(network, vectors=False)} for network in networks]
    groups += [{"params": chosen(network, True), "WD_exclude": True, "weight_decay": 0} for network in networks]
    return torch.optim.AdamW(groups)


def train_step(networks, optimizer, batch, *, learning_rate, weight_decay, momentum, autocast=contextlib.nullcontext):
    """One step of I-JEPA, its forward pass under `autocast()`; returns the loss."""
    encoder, predictor, target = networks
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if not group.get("WD_exclude"):
            group["weight_decay"] = weight_decay
    images, context_masks = batch["pixel_values"], [batch["context_indices"]]
    target_masks = list(batch["target_indices"].unbind(1))
    with autocast():
        with torch.no_grad():
            full = target(images)
            wanted = pick(functional.layer_norm(full, full.shape[-1:]), target_masks)
        predicted = predictor(encoder(images, context_masks), context_masks, target_masks)
        loss = functional.smooth_l1_loss(predicted, wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), encoder.parameters(), strict=True):
            ours.mul_(momentum).add_((1 - momentum) * theirs)
    return loss.item()


def make_batch(seed):
    """Four random images for the small model; of each, 24 patches of context and four target blocks of 8 others."""
    generator = torch.Generator().manual_seed(seed)
    size = SMALL["image_size"]
    patches = (size // SMALL["patch_size"]) ** 2
    images = torch.randn(4, 3, size, size, generator=generator)
    order = torch.rand(4, patches, generator=generator).argsort(dim=1)
    return {
        "pixel_values": images,
        "context_indices": order[:, :24].contiguous(),
        "target_indices": order[:, 24:56].unflatten(1, (4, 8)).contiguous(),
    }


@functools.cache
def _train(steps):
    networks = make_networks()
    optimizer = make_adamw(*networks[:2])
    for step in range(steps):
        train_step(networks, optimizer, make_batch(step), **TRAINING)
    return networks, optimizer


def trained_networks(steps):
    """The small networks and their AdamW after a few steps, each on the batch of its number; the caller's own."""
    return copy.deepcopy(_train(steps))


def checkpoint_contents(networks, optimizer=None, *, epoch=1, prefix="module."):
    """What the published code saves."""
    encoder, predictor, target = (
        {prefix + name: value for name, value in network.state_dict().items()} for network in networks
    )
    return {
        "encoder": encoder,
        "predictor": predictor,
        "target_encoder": target,
        "opt": None if optimizer is None else optimizer.state_dict(),
        "scaler": None,
        "epoch": epoch,
        "loss": 0.25,
        "batch_size": 4,
        "world_size": 2,
        "lr": 0.001,
    }


def write_checkpoint(path, change=None, *, steps=0, legacy=False, **options):
    """A file of the published kind, with its optimizer if it was trained; `change` is called with what goes in."""
    networks, optimizer = trained_networks(steps)
    saved = checkpoint_contents(networks, optimizer if steps else None, **options)
    if change is not None:
        change(saved)
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_run(path, change=None):
    """A file as a run of four steps, two in each epoch, leaves it."""
    return write_checkpoint(path, change, steps=4, epoch=2)


def same_bits(one, other):
    """Whether two dictionaries hold the same float32 tensors bit for bit; their names have to be the same."""
    assert list(one) == list(other)
    return all(
        one[name].dtype == other[name].dtype == torch.float32
        and torch.equal(one[name].reshape(-1).view(torch.int32), other[name].reshape(-1).view(torch.int32))
        for name in one
    )


def write_checkout(folder, change=("", "")):
    """A folder laid out as a checkout of the published code, with the networks of this file; one text may differ."""
    source = Path(__file__).read_text("utf-8")
    assert change[0] in source
    module = Path(folder) / "src" / "models" / "vision_transformer.py"
    module.parent.mkdir(parents=True)
    module.write_text(source.replace(*change) if change[0] else source, "utf-8")
    return Path(folder)
