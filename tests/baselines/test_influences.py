"""Influence functions and RelatIF against explicit matrices."""

import pytest
import torch

import hydragrad as hg
from hydragrad import baselines
from hydragrad.baselines.solvers import conjugate_gradients
from tests.baselines.dense import Dense, trained
from tests.tolerances import ORACLE, assert_close

DAMPING = 2.5  # above the most negative eigenvalue of the Hessians here


def expected(dense: Dense, curvature: str) -> torch.Tensor:
    matrix = dense.curvature(curvature) + DAMPING * torch.eye(len(dense.w), dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0
    return dense.gradients @ torch.linalg.inv(matrix) @ dense.query_gradients.T / len(dense.samples)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp_tanh", "token_loss", "regression", "convnet", "batchnorm", "frozen", "gru"])
def test_dense_and_cg_are_the_formula(name, curvature, tmp_path):
    run, dense, problem, _ = trained(name, tmp_path / "run")
    right = expected(dense, curvature)
    for solver, more in (("dense", {}), ("cg", {"iterations": 500, "tolerance": 1e-13})):
        found = baselines.influence(
            run, problem.queries, solver=solver, curvature=curvature, damping=DAMPING, batch=5, **more
        )
        assert_close(found.values, right, ORACLE)
        assert found.diagnostics.verdict == "unchecked"


def test_a_summed_token_loss_counts_as_its_sum(tmp_path):
    run, dense, problem, _ = trained("token_loss", tmp_path / "run", reduction="sum")
    assert not dense.mean_tokens
    found = baselines.influence(run, problem.queries, solver="dense", damping=DAMPING)
    assert_close(found.values, expected(dense, "hessian"), ORACLE)


def test_lissa_on_the_whole_set_converges_to_the_formula(tmp_path):
    run, dense, problem, _ = trained("mlp_tanh", tmp_path / "run")
    found = baselines.influence(
        run, problem.queries, solver="lissa", damping=DAMPING, scale=5.0, iterations=300, repeats=1, batch=99
    )
    assert_close(found.values, expected(dense, "hessian"), ORACLE)


def test_lissa_on_samples_comes_near(tmp_path):
    run, dense, problem, _ = trained("mlp_tanh", tmp_path / "run")
    found = baselines.influence(
        run, problem.queries, solver="lissa", damping=DAMPING, scale=100.0, iterations=400, repeats=4, batch=6
    )
    assert_close(found.values, expected(dense, "hessian"), {torch.float64: 0.05})
    again = baselines.influence(
        run, problem.queries, solver="lissa", damping=DAMPING, scale=100.0, iterations=400, repeats=4, batch=6
    )
    assert torch.equal(found.values, again.values)


def test_lissa_that_diverges_is_refused(tmp_path):
    run, _, problem, _ = trained("mlp_tanh", tmp_path / "run")
    with pytest.raises(hg.NonFiniteError, match="LiSSA diverged"):
        baselines.influence(run, problem.queries, solver="lissa", scale=0.01, iterations=50)


@pytest.mark.parametrize("kind", ["theta", "l"])
def test_relatif_is_the_formula(kind, tmp_path):
    run, dense, problem, _ = trained("mlp_tanh", tmp_path / "run")
    inverse = torch.linalg.inv(dense.curvature("gauss-newton") + 0.1 * torch.eye(len(dense.w), dtype=torch.float64))
    g = dense.gradients
    norms = (g @ inverse).norm(dim=1) if kind == "theta" else ((g @ inverse) * g).sum(1).sqrt()
    right = g @ inverse @ dense.query_gradients.T / norms.unsqueeze(1)
    found = baselines.relatif(run, problem.queries, kind=kind, damping=0.1, iterations=500, tolerance=1e-13)
    assert_close(found.values, right, ORACLE)


def test_self_influence_is_the_diagonal(tmp_path):
    run, _, problem, _ = trained("mlp_tanh", tmp_path / "run")
    found = baselines.self_influence(run, damping=0.1, iterations=500, tolerance=1e-13)
    square = baselines.influence(run, problem.samples, solver="dense", curvature="gauss-newton", damping=0.1).values
    assert_close(found, square.diagonal(), ORACLE)


def test_one_layer_alone(tmp_path):
    run, dense, problem, _ = trained("mlp_tanh", tmp_path / "run")
    last = torch.tensor([name.startswith("2.") for name in dense.names]).repeat_interleave(
        torch.tensor([p.numel() for p in dense.model.parameters()])
    )
    matrix = dense.curvature("hessian")[last][:, last] + DAMPING * torch.eye(int(last.sum()), dtype=torch.float64)
    right = dense.gradients[:, last] @ torch.linalg.inv(matrix) @ dense.query_gradients[:, last].T / len(dense.samples)
    found = baselines.influence(run, problem.queries, solver="dense", damping=DAMPING, layer="2")
    assert_close(found.values, right, ORACLE)
    with pytest.raises(hg.MismatchError, match="layer 'nowhere'"):
        baselines.influence(run, problem.queries, layer="nowhere")


def test_negative_curvature_is_said(tmp_path):
    run, dense, problem, _ = trained("mlp_tanh", tmp_path / "run")
    lowest = float(torch.linalg.eigvalsh(dense.curvature("hessian")).min())
    assert lowest < 0
    found = baselines.influence(run, problem.queries, damping=-lowest / 2, iterations=500)
    assert any("negative curvature" in reason for reason in found.diagnostics.reasons)


def test_conjugate_gradients_treat_each_row_by_itself():
    matrix = torch.diag(torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    asked = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return rows @ matrix

    solved = conjugate_gradients(product, b, 10, 1e-12)
    assert asked == [2, 1]  # a row that has ended costs nothing more
    assert_close(solved.x[0], torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64), ORACLE)
    assert solved.stopped == 1
    assert not bool(solved.x[1:].any())


@pytest.mark.parametrize("wrong", [{"solver": "lu"}, {"curvature": "fisher"}, {"damping": -1.0}, {"iterations": 0}])
def test_unknown_settings_are_refused(wrong, tmp_path):
    run, _, problem, _ = trained("mlp_tanh", tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=next(iter(wrong))):
        baselines.influence(run, problem.queries, **wrong)
