"""Attention against torch's own, and the paths of an attentive neural process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.core.episodes import Support
from models import ANP
from models.generative.set_networks import Attention


def by_torch(block: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The block by torch.nn.MultiheadAttention, whose projections it is given."""
    size = query.shape[-1]
    attention = nn.MultiheadAttention(size, block.heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        attention.out_proj.weight.copy_(torch.eye(size))
    attended, _ = attention(query[None], key[None], value[None])
    first, second = block.norms
    x = F.layer_norm(query @ block.query.weight.T + attended[0], (size,), first.weight, first.bias)
    fed = F.relu(x @ block.feed.weight.T + block.feed.bias)
    return F.layer_norm(x + fed, (size,), second.weight, second.bias)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_torchs(heads):
    """Catches heads that are cut along the points, a scale by the whole size, and a softmax over queries."""
    torch.manual_seed(0)
    block = Attention(8, heads).double()
    for norm in block.norms:
        nn.init.normal_(norm.weight)
    query, key, value = (torch.randn(n, 8, dtype=torch.float64) for n in (3, 5, 5))
    got = block.look_up(query, block.key(key), block.value(value))
    torch.testing.assert_close(got, by_torch(block, query, key, value), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(key), by_torch(block, key, key, key), rtol=1e-10, atol=1e-12)


def test_prediction_is_that_of_its_paths():
    """Catches keys of (x, y), values of x, a latent without self-attention, and a code of another query: every part
    by torch's attention, the decoder on a concatenation for each sample and query."""
    torch.manual_seed(0)
    learner = ANP(hidden=8, latents=3, heads=2, eval_samples=4).double().eval()
    support = Support(*(torch.randn(6, 1, dtype=torch.float64) for _ in range(2)), 0)
    x = torch.randn(5, 1, dtype=torch.float64)
    points = torch.cat([support.x, support.y], -1)

    def encoded(sequence: nn.Sequential) -> torch.Tensor:
        mlp, relu, block = sequence
        assert sum(isinstance(m, nn.Linear) for m in mlp.modules()) == 2
        hidden = relu(mlp(points))
        return by_torch(block, hidden, hidden, hidden)

    mean, raw = learner.latent.whole(encoded(learner.latent.point).mean(0)).chunk(2)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = mean + (0.1 + 0.9 / (1 + (-raw).exp())) * noise
    codes = by_torch(learner.attention, learner.positions(x), learner.positions(support.x), encoded(learner.points))
    prediction = learner.predict(learner.adapt(support), x)
    torch.testing.assert_close(learner.embed_task(support), mean)
    for m in range(4):
        for j in range(5):
            made = learner.decoder.rest(learner.decoder.first(torch.cat([codes[j], z[m], x[j]]))).detach().numpy()
            assert prediction.mean[m, j, 0].item() == pytest.approx(made[0], rel=1e-9)
            assert prediction.deviation[m, j, 0].item() == pytest.approx(0.1 + 0.9 * np.log1p(np.exp(made[1])))


@pytest.mark.parametrize(("setting", "said"), [({"heads": 3}, "multiple of heads"), ({"encoder_layers": 2}, "least 3")])
def test_sizes_that_do_not_go_together_are_refused(setting, said):
    """Catches an error of a reshape, far from the setting."""
    with pytest.raises(ValueError, match=said):
        ANP(**setting)
