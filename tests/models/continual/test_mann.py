"""Memory-augmented neural networks."""

import numpy as np
import torch

from models import MANN, Pixels
from models.continual.learner import Stream
from models.core.chance import Chance


def stream(length: int = 9, ways: int = 3, seed: int = 0) -> Stream:
    """Random 2×2 pictures of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(length, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(length)[:, None] % ways
    none = x.new_zeros(0)
    return Stream(x, y, x, y, none, none, ways, Chance.of(torch.tensor(1)))


def learner() -> MANN:
    torch.manual_seed(0)
    return MANN(Pixels(image_size=2), ways=3, slots=5, width=4, heads=2, hidden=6, decay=0.8).double()


def restated(model: MANN, task: Stream) -> np.ndarray:
    """Logits of every example before its label is told: loops over slots and heads, with NumPy."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    memory, usage = np.full((5, 4), 1e-6), np.zeros(5)
    read, label = np.zeros((2, 5)), np.zeros(3)
    h, c, told, last_read = np.zeros(6), np.zeros(6), [], np.zeros(8)
    for image, y in zip(task.x.flatten(1).numpy(), task.y[:, 0].tolist(), strict=True):
        z = p["controller.weight_ih"] @ np.concatenate([image, label]) + p["controller.bias"]
        z = z + p["controller.weight_hh"] @ np.concatenate([h, last_read])
        i, f, g, o = np.split(z, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        keys = np.tanh(p["keys.weight"] @ h + p["keys.bias"]).reshape(2, 4)
        gate = sigmoid(p["gates.weight"] @ h + p["gates.bias"])
        least = sorted(range(5), key=lambda s: (usage[s], s))[:2]
        write = np.zeros((2, 5))
        for head in range(2):
            for slot in range(5):
                write[head, slot] = gate[head] * read[head, slot] + (1 - gate[head]) * (slot == least[head])
        memory = memory.copy()
        memory[least[0]] = 0
        for head in range(2):
            for slot in range(5):
                memory[slot] = memory[slot] + write[head, slot] * keys[head]
        read = np.zeros((2, 5))
        for head in range(2):
            cosines = [keys[head] @ m / (np.linalg.norm(keys[head]) * np.linalg.norm(m)) for m in memory]
            read[head] = np.exp(cosines) / np.exp(cosines).sum()
        usage = 0.8 * usage + read.sum(0) + write.sum(0)
        last_read = np.concatenate([read[head] @ memory for head in range(2)])
        told.append(p["answer.weight"] @ np.concatenate([h, last_read]) + p["answer.bias"])
        label = np.eye(3)[y]
    return np.stack(told)


def test_is_the_papers_access():
    """Catches labels a step early or late, usage that does not decay, slots read before they are written, heads that
    write to one slot, a slot that is not erased: against loops with NumPy."""
    model, task = learner(), stream()
    expected = torch.from_numpy(restated(model, task))
    loss, logits = model.objective(task)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, task.y[:, 0]))
    state = model.begin(3, task.chance)
    for number in range(len(task.x)):
        encoded = task._replace(x=model.encode(task.x.flatten(0, 1))[:, None])
        torch.testing.assert_close(model.predict(state, encoded.x[number])[0], expected[number])
        state = model.update(state, encoded.experience(number))


def test_meta_gradient():
    """Catches what is detached along the way: finite differences in float64 of the loss of a stream."""
    model, task = learner(), stream(6)
    model.objective(task)[0].backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                losses.append(model.objective(task)[0].item())
                parameter -= sign * 1e-6 * direction
        numeric = (losses[0] - losses[1]) / 2e-6
        assert abs(numeric - (parameter.grad * direction).sum().item()) < 1e-6 + 1e-5 * abs(numeric), name
