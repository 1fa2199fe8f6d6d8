"""Feature-wise modulation by a task's own scales and shifts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from models.networks.backbones import MLP, Conv4, ResNet
from models.networks.modulation import modulation_points

BACKBONES = {
    "Conv4": lambda: Conv4(1, 4, 16),
    "Conv4 pool": lambda: Conv4(1, 4, 16, downsample="pool"),
    "ResNet": lambda: ResNet(1, (4, 6), 2, 16),
    "MLP": lambda: MLP(3, (5, 4), batch_norm=True),
}


def built(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    backbone = BACKBONES[name]().double()
    return backbone, torch.randn(6, *backbone.input_shape, dtype=torch.float64)


@pytest.mark.parametrize("name", BACKBONES)
def test_modulation_points_do_nothing_until_they_are_given_something(name):
    """Catches modulation that changes a network which nobody modulates, or that fills its checkpoints."""
    backbone, x = built(name)
    plain, keys = backbone(x), backbone.state_dict().keys()
    for film in modulation_points(backbone).values():
        film.activate()
    torch.testing.assert_close(backbone(x), plain, rtol=0, atol=0)
    assert backbone.state_dict().keys() == keys


def test_scale_and_shift_of_a_layer_in_closed_form():
    """Catches scale and shift in the wrong place: after the nonlinearity, before the norm, or of another layer."""
    backbone, x = built("MLP")
    (first, film), _ = modulation_points(backbone).items()
    film.activate()
    scale, shift = torch.randn(2, 5, dtype=torch.float64)
    found = functional_call(backbone, {f"{first}.scale": scale, f"{first}.shift": shift}, (x,))
    z = backbone.layers[0](x)
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    z = backbone.layers[1](F.relu(scale * z + shift))
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found, F.relu(z))


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_by_scales_of_tasks_that_are_mapped_over(name):
    """Catches a derivative by γ and β that is wrong under vmap, against finite differences of a loop."""
    backbone, x = built(name)
    points = modulation_points(backbone)
    for film in points.values():
        film.activate()
    start = {f"{n}.{p}": torch.randn(2, f.channels).double() for n, f in points.items() for p in ("scale", "shift")}

    def loss(values):
        return functional_call(backbone, values, (x,)).square().sum()

    found = vmap(grad(loss))(start)
    for key, value in start.items():
        for task in range(2):
            own = {k: v[task] for k, v in start.items()}
            step = torch.zeros_like(value[task])
            step[0] = 1e-6
            up, down = loss(own | {key: value[task] + step}), loss(own | {key: value[task] - step})
            assert found[key][task, 0].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-4, abs=1e-5)
