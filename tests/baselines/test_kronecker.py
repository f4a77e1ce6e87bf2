"""KFAC and EKFAC where a Kronecker product is the whole truth, and what they refuse."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad import baselines
from tests.baselines.dense import trained
from tests.tolerances import ORACLE, assert_close
from tests.trajectory.loops import bind, make_data, make_model, record_run

N, D, OUT = 20, 4, 3


def squared(model, batch):
    """The mean over outputs, as nn.MSELoss() has it."""
    return (model(batch[0]) - batch[1]).square().mean(1)


@pytest.fixture
def linear(tmp_path):
    """A linear layer with a bias and squared errors: the Hessian is I x E[aa^T], a Kronecker product."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(N, n, generator=generator, dtype=torch.float64) for n in (D, OUT)))
    model = nn.Linear(D, OUT).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer, reduction="mean") as recording:
        for batch in recording.batches(torch.utils.data.DataLoader(data, batch_size=5)):
            optimizer.zero_grad()
            squared(model, batch).mean().backward()
            optimizer.step()
    return hg.load(tmp_path / "run", model=model, loss=squared, data=data), [data[i] for i in range(4)]


@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
def test_it_is_exact_where_the_hessian_is_a_kronecker_product(linear, corrected):
    pytest.importorskip("curvlinops")
    run, queries = linear
    right = baselines.influence(run, queries, solver="dense", damping=0.05).values
    found = baselines.kfac(run, queries, corrected=corrected, damping=0.05, criterion=nn.MSELoss(), batch=7)
    assert_close(found.values, right, ORACLE)
    assert found.method == ("ekfac" if corrected else "kfac")


def factors_of_a_layer(
    net: nn.Sequential, place: int, points: torch.Tensor, corrected: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis [p, p] and eigenvalues [p] of one layer's curvature (weight and bias as [out, in + 1]), example by example.

    The Fisher of the softmax is diag(p) - pp^T = S S^T; its columns, pulled back to the layer's output, stand for the
    gradients over the labels.
    """
    inputs, slopes = [], []
    for point in points:
        a = net[:place](point)
        z = net[place](a).detach().requires_grad_()
        out = net[place + 1 :](z)
        prob = out.detach().softmax(0)
        values, vectors = torch.linalg.eigh(torch.diag(prob) - torch.outer(prob, prob))
        columns = vectors * values.clamp_min(0).sqrt()
        pulled = [torch.autograd.grad(out, z, column, retain_graph=True)[0] for column in columns.T]
        inputs.append(torch.cat([a.detach(), torch.ones(1, dtype=a.dtype)]))
        slopes.append(torch.stack(pulled))
    a, g = torch.stack(inputs), torch.stack(slopes)  # [n, d + 1], [n, C, out]
    of_a, q_a = torch.linalg.eigh(a.T @ a / len(a))
    of_g, q_g = torch.linalg.eigh(torch.einsum("nco,ncp->op", g, g) / len(a))
    exact = torch.einsum("nco,nd->od", (g @ q_g).square(), (a @ q_a).square()) / len(a)
    eigenvalues = exact if corrected else torch.outer(of_g, of_a)
    return torch.kron(q_g, q_a), eigenvalues.flatten()


@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
def test_it_is_the_formula_on_a_network(corrected, tmp_path):
    pytest.importorskip("curvlinops")
    data = make_data(dtype=torch.float64)
    net = record_run(tmp_path / "run", make_model(torch.float64), data=data)
    assert isinstance(net, nn.Sequential)
    run = bind(tmp_path / "run", model=make_model(torch.float64), data=data)

    def rows(place: int) -> torch.Tensor:
        """Gradients of all examples over one layer, as [out, in + 1] flattened."""
        found = []
        for point, label in zip(*data.tensors, strict=True):
            loss = F.cross_entropy(net(point), label)
            weight, bias = torch.autograd.grad(loss, [net[place].weight, net[place].bias])  # type: ignore[arg-type]
            found.append(torch.cat([weight, bias.unsqueeze(1)], 1).flatten())
        return torch.stack(found)

    right = torch.zeros(len(data), len(data), dtype=torch.float64)
    for place in (0, 2):
        basis, eigenvalues = factors_of_a_layer(net, place, data.tensors[0], corrected)
        turned = rows(place) @ basis
        right += turned / (eigenvalues + 0.03) @ turned.T / len(data)
    found = baselines.kfac(run, data, corrected=corrected, damping=0.03, batch=8)
    assert_close(found.values, right, ORACLE)


def test_it_refuses_a_criterion_that_is_not_the_loss(linear):
    pytest.importorskip("curvlinops")
    run, queries = linear
    with pytest.raises(hg.MismatchError, match="criterion"):
        baselines.kfac(run, queries, criterion=nn.MSELoss(reduction="sum"))


def test_it_refuses_outputs_that_the_criterion_does_not_take(tmp_path):
    pytest.importorskip("curvlinops")
    run, _, problem, _ = trained("token_loss", tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match="does not take"):
        baselines.kfac(run, problem.queries)


def test_it_refuses_layers_it_does_not_know(tmp_path):
    pytest.importorskip("curvlinops")
    data = make_data()
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    record_run(tmp_path / "run", model, data=data)
    run = bind(tmp_path / "run", model=model, data=data)
    with pytest.raises(hg.UnsupportedError, match="LayerNorm"):
        baselines.kfac(run, data)


def test_it_refuses_samples_that_are_no_pairs(tmp_path):
    pytest.importorskip("curvlinops")
    data = TensorDataset(make_data().tensors[0])

    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[0][:, :3], reduction="none").sum(1)

    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(torch.utils.data.DataLoader(data, batch_size=11)):
            loss(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=loss, data=data)
    with pytest.raises(hg.UnsupportedError, match="pairs"):
        baselines.kfac(run, data)


def test_without_the_extra_it_says_what_to_install(linear, monkeypatch):
    run, queries = linear
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(hg.UnsupportedError, match=r"hydragrad\[baselines\]"):
        baselines.kfac(run, queries)
