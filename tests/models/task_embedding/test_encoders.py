"""Task embeddings that are trained along, against torch's own layers and by what they must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from datamodules.core.episodes import Support
from tests.support.gradients import episodes


def functions(n: int = 6) -> Support:
    g = torch.Generator().manual_seed(0)
    return Support(*(torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2)), 0)


def test_recurrent_encoder_is_torchs_bidirectional_lstm():
    """Catches directions that are joined at the wrong ends, and a second layer that reads one direction alone."""
    torch.manual_seed(0)
    encoder = models.RecurrentEncoder(2, 5, 2).double()
    reference = nn.LSTM(2, 5, 2, bidirectional=True).double()
    for layer in range(2):
        for cells, suffix in ((encoder.onward, ""), (encoder.back, "_reverse")):
            cell = cells[layer]
            for ours, theirs in (("weight_ih", "weight_ih"), ("weight_hh", "weight_hh"), ("bias", "bias_ih")):
                getattr(reference, f"{theirs}_l{layer}{suffix}").data.copy_(getattr(cell, ours).data)
            getattr(reference, f"bias_hh_l{layer}{suffix}").data.zero_()
    support = functions()
    output, _ = reference(torch.cat([support.x, support.y], 1))
    expected = torch.cat([output[-1, :5], output[0, 5:]])
    torch.testing.assert_close(encoder.embed_task(support), expected)


def test_recurrent_encoder_depends_on_the_order_unless_it_is_told_to_sort():
    """Catches an encoder that is said to be of sets and is not, and the reverse."""
    support = functions()
    turned = Support(support.x.flip(0), support.y.flip(0), 0)
    for ordered in (False, True):
        torch.manual_seed(0)
        encoder = models.RecurrentEncoder(2, 4, 1, ordered).double()
        same = torch.allclose(encoder.embed_task(support), encoder.embed_task(turned))
        assert same == ordered


def test_set_encoder_knows_neither_order_nor_names_of_classes():
    """Catches an embedding of how a task happens to be written down."""
    torch.manual_seed(0)
    encoder = models.SetEncoder(models.Conv4(hidden=4, image_size=8), 5).double()
    support = episodes(tasks=1, shots=3)[0].support
    order = torch.randperm(len(support.y))
    renamed = Support(support.x[order], (support.y[order] + 1) % 3, 3)
    torch.testing.assert_close(encoder.embed_task(renamed), encoder.embed_task(support))
    encoder = models.SetEncoder(models.MLP(2, (6,)), 5).double()
    functions_ = functions()
    order = torch.randperm(6)
    turned = Support(functions_.x[order], functions_.y[order], 0)
    torch.testing.assert_close(encoder.embed_task(turned), encoder.embed_task(functions_))
    changed = Support(functions_.x, functions_.y[order], 0)
    assert (encoder.embed_task(changed) - encoder.embed_task(functions_)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["MAML", "ProtoNet"])
def test_prototype_mean_is_of_the_learners_own_backbone(kind):
    """Catches a second backbone beside the learner's, and a mean over examples where classes are unequal."""
    torch.manual_seed(0)
    backbone = models.Conv4(hidden=4, image_size=8)
    learner = models.MAML(backbone, 3) if kind == "MAML" else models.ProtoNet(backbone, batch_norm="transductive")
    conditioned = models.Conditioned(models.PrototypeMean(), models.LowRank(), learner).double()
    whole = episodes(tasks=1, shots=3)[0].support
    support = Support(whole.x[:7], whole.y[:7], 3)  # three, three and one
    z = backbone(support.x)
    expected = torch.stack([z[:3].mean(0), z[3:6].mean(0), z[6]]).mean(0)
    torch.testing.assert_close(conditioned.embed_task(support), expected)
    names = [n for n, _ in conditioned.named_parameters()]
    assert len(names) == len(set(names)) and not any(n.startswith("embedding.") for n in names)


def test_task_label_is_the_group():
    """Catches labels that are counted from one."""
    support = functions()
    told = Support(support.x, support.y, 0, facts={"group": torch.tensor(2)})
    assert models.TaskLabel(4).embed_task(told).tolist() == [0, 0, 1, 0]
