"""A transformer neural process against torch's own transformer, and its mask against one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datamodules.core.episodes import Support, Task
from models import TNP


def small() -> TNP:
    torch.manual_seed(0)
    learner = TNP(size=8, depth=3, heads=2, feedforward=12, embedding_layers=2).double().eval()
    for parameter in learner.parameters():  # none that is 0 or 1 from the start hides another
        nn.init.normal_(parameter, std=0.4)
    return learner


def task(shots: int = 6, queries: int = 5) -> Task:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shots + queries, 1, generator=g, dtype=torch.float64) for _ in range(2))
    return Task(Support(x[:shots], y[:shots], 0), x[shots:], y[shots:])


def torchs_encoder(learner: TNP) -> nn.TransformerEncoder:
    """torch's transformer with the learner's weights."""
    torch_layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(torch_layer, len(learner.layers), enable_nested_tensor=False).double()
    with torch.no_grad():
        for theirs, ours in zip(encoder.layers, learner.layers, strict=True):
            attention = theirs.self_attn
            attention.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
            attention.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
            pairs = [(attention.out_proj, ours.out), (theirs.linear1, ours.feed[0]), (theirs.linear2, ours.feed[2])]
            pairs += [(theirs.norm1, ours.norms[0]), (theirs.norm2, ours.norms[1])]
            for their, own in pairs:
                their.load_state_dict(own.state_dict())
    return encoder


def by_torch(learner: TNP, of: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation by torch's transformer over the whole sequence, with the published mask."""
    shots, queries = len(of.support.x), len(of.query_x)
    known, asked = torch.cat([of.support.x, of.support.y], 1), torch.cat([of.query_x, torch.zeros_like(of.query_y)], 1)
    hidden = torch.full((shots + queries, shots + queries), -torch.inf, dtype=torch.float64)
    hidden[:, :shots] = 0
    tokens = learner.embed(torch.cat([known, asked]))
    made = learner.head(torchs_encoder(learner)(tokens[None], mask=hidden)[0, shots:])
    return made[:, :1], made[:, 1:].exp()


def test_is_torchs_transformer_with_the_published_mask():
    """Catches a norm before its addition, a key for a value, a layer's keys of the tokens after it, a deviation that is
    not the exponential, and queries that carry their targets."""
    learner, of = small(), task()
    prediction = learner.predict(learner.adapt(of.support), of.query_x)
    mean, deviation = by_torch(learner, of)
    torch.testing.assert_close(prediction.mean[0], mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(prediction.deviation[0], deviation, rtol=1e-9, atol=1e-11)


def test_mask_is_one_query_at_a_time():
    """Catches a mask by which queries see themselves or one another: alone in the sequence, whatever their target,
    each is predicted as among the others."""
    learner, of = small(), task()
    together = learner.predict(learner.adapt(of.support), of.query_x)
    for j in range(len(of.query_x)):
        alone = Task(of.support, of.query_x[j : j + 1], of.query_y[j : j + 1] + 100)
        mean, deviation = by_torch(learner, alone)
        torch.testing.assert_close(together.mean[0, j], mean[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together.deviation[0, j], deviation[0], rtol=1e-9, atol=1e-11)


def test_sizes_are_those_of_the_published_results():
    """Catches a layer too many or too few: as many parameters as torch's transformer of the published sizes, with an
    embedding of 2-64-64-64-64 and a head of 64-128-2."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), 6, enable_nested_tensor=False
    )
    others = (2 + 1) * 64 + 3 * (64 + 1) * 64 + (64 + 1) * 128 + (128 + 1) * 2
    expected = sum(p.numel() for p in encoder.parameters()) + others
    assert sum(p.numel() for p in TNP().parameters()) == expected


def test_sizes_that_do_not_go_together_are_refused():
    """Catches an error of a reshape, far from the setting."""
    with pytest.raises(ValueError, match="multiple of heads"):
        TNP(size=10, heads=4)
