"""Layers whose kernels autograd cannot differentiate twice: in plain operations they are exact, else refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

import hydragrad as hg
from hydragrad.step.plain_forms import activations_kept, forms_needed, plain_forms
from tests.hypergradient.recorded import STEPS, recipe_of, recorded, values
from tests.oracles import unroll
from tests.test_refusals import trained
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close, relative_error
from tests.zoo import CLASSES, Case, case

TOKENS = 7


class Bags(nn.Module):
    """Bags of tokens: rows of a matrix, or one row after the other with the places where they start."""

    def __init__(self, flat: bool, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(TOKENS, 4, **options), nn.Linear(4, CLASSES)
        self.flat, self.weighted = flat, weighted

    def forward(self, tokens: Tensor) -> Tensor:
        weights = (tokens + 1.0).to(self.head.weight) / TOKENS if self.weighted else None
        if not self.flat:
            return self.head(torch.tanh(self.bags(tokens, per_sample_weights=weights)))
        starts = torch.arange(len(tokens)) * tokens.shape[1]
        if self.bags.include_last_offset:
            starts = torch.cat([starts, torch.tensor([tokens.numel()])])
        given = None if weights is None else weights.flatten()
        return self.head(torch.tanh(self.bags(tokens.flatten(), starts, per_sample_weights=given)))


class ByHand(Bags):
    """The same from single embeddings, one bag at a time."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = []
        for bag in tokens:
            kept = bag if self.bags.padding_idx is None else bag[bag != self.bags.padding_idx]
            vectors = self.bags.weight[kept]
            if self.weighted:
                vectors = vectors * ((kept + 1.0).to(vectors) / TOKENS)[:, None]
            if not len(kept):
                rows.append(torch.zeros_like(self.bags.weight[0]))
            else:
                rows.append(vectors.sum(0) if self.bags.mode == "sum" else vectors.mean(0))
        return self.head(torch.tanh(torch.stack(rows)))


OPTIONS = [
    {"flat": False, "mode": "mean"},
    {"flat": True, "mode": "mean", "padding_idx": 2},
    {"flat": False, "mode": "mean", "padding_idx": -1},
    {"flat": True, "mode": "sum", "include_last_offset": True},
    {"flat": True, "mode": "sum", "weighted": True},
]


def problem_of(options: dict[str, Any], kind: Callable[..., nn.Module] = Bags) -> Case:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return kind(**options).double()

    return replace(case("embedding"), build=build)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bags_of_embeddings_are_exact(options: dict[str, Any], tmp_path: Path) -> None:
    run = recorded(recipe_of(problem_of(options)), tmp_path / "run")
    assert hg.verify(run).exact  # the replay runs torch's own kernel
    queries = problem_of(options).queries
    truth = unroll(recipe_of(problem_of(options, ByHand), steps=STEPS)).scores(queries)
    assert relative_error(values(run, queries, compile=False), truth) <= ORACLE[torch.float64]


def test_bags_that_are_empty_first_last_and_beside_each_other() -> None:
    """A start that several bags share belongs to the last of them; torch's kernel is the oracle."""
    tokens, starts = torch.tensor([1, 4, 4, 0, 6, 2]), torch.tensor([0, 0, 3, 3, 3, 6])
    for mode in ("sum", "mean"):
        layer = nn.EmbeddingBag(TOKENS, 4, mode=mode, padding_idx=6).double()
        expected = layer(tokens, starts)
        (slopes,) = torch.autograd.grad(expected.square().sum(), layer.weight)
        with plain_forms(forms_needed(layer)):
            found = layer(tokens, starts)
        (ours,) = torch.autograd.grad(found.square().sum(), layer.weight)
        assert_close(found, expected, SAME)
        assert_close(ours, slopes, SAME)


def test_bags_of_other_kinds_are_left_to_torch_and_refused(tmp_path: Path) -> None:
    run = recorded(recipe_of(problem_of({"flat": False, "mode": "max"})), tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=r"torch cannot differentiate this model or loss"):
        hg.attribute(run, problem_of(OPTIONS[0]).queries, progress=False)


def test_what_torch_cannot_differentiate_twice_is_refused_by_name(tmp_path: Path) -> None:
    """The function called directly: no layer tells that a plain form is needed."""

    def loss(model: Callable[..., Tensor], batch: Any) -> Tensor:
        tokens, labels = batch
        bags: Any = model
        return F.cross_entropy(bags.head(F.embedding_bag(tokens, bags.table.weight)), labels, reduction="none")

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(TOKENS, 4), nn.Linear(4, CLASSES)

    problem = replace(case("embedding"), build=lambda: Direct().double(), loss=loss)
    torch.manual_seed(0)
    run = recorded(recipe_of(problem), tmp_path / "run")
    words = r"torch cannot differentiate this model or loss as method='exact' needs it.*_embedding_bag_backward"
    with pytest.raises(hg.UnsupportedError, match=words):
        hg.attribute(run, problem.queries, progress=False)


class Table(nn.Module):
    """Embeddings by torch's layer, or by the function called directly."""

    def __init__(self, direct: bool = False, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, 4, **options), nn.Linear(4, CLASSES)
        self.direct, self.options = direct, options
        self.table.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.table.weight, **self.options) if self.direct else self.table(tokens)
        return self.head(torch.tanh(rows).mean(1))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"scale_grad_by_freq": True}, "divides its gradient by the frequency"),
        ({"max_norm": 0.5}, "shortens its rows in every forward pass"),
    ],
)
def test_embeddings_whose_steps_follow_no_gradient_are_refused(
    option: dict[str, Any], words: str, direct: bool, tmp_path: Path
) -> None:
    problem = problem_of({"direct": direct, **option}, Table)
    run = recorded(recipe_of(problem), tmp_path / "run")
    assert hg.verify(run).exact
    for method in ("exact", "hessian-free"):
        with pytest.raises(hg.UnsupportedError, match=rf"{words}.*Got: {next(iter(option))}=.*Remedy: "):
            hg.attribute(run, problem.queries, method=method, progress=False)


def test_embeddings_that_do_not_train_are_let_be(tmp_path: Path) -> None:
    problem = problem_of({"frozen": True, "scale_grad_by_freq": True}, Table)
    found = values(recorded(recipe_of(problem), tmp_path / "run"), problem.queries, compile=False)
    truth = unroll(recipe_of(problem, steps=STEPS)).scores(problem.queries)
    assert relative_error(found, truth) <= ORACLE[torch.float64]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad
@pytest.mark.parametrize(("optimizer", "hyper"), [("SGD", {"lr": 0.3}), ("Adagrad", {"lr": 0.1, "eps": 1e-3})])
@pytest.mark.parametrize("kind", [Table, Bags])
def test_embeddings_with_sparse_gradients_are_exact(
    kind: Callable[..., nn.Module], optimizer: str, hyper: dict[str, float], tmp_path: Path
) -> None:
    """The oracle's gradients are dense: a row that no token names has a gradient of zeros."""

    def problem(sparse: bool) -> Case:
        return problem_of({"sparse": sparse, **({"flat": False} if kind is Bags else {})}, kind)

    run = recorded(recipe_of(problem(True), optimizer, hyper), tmp_path / "run")
    assert hg.verify(run).exact
    queries = problem(False).queries
    oracle = problem_of({"flat": False, "mode": "mean"}, ByHand) if kind is Bags else problem(False)
    truth = unroll(recipe_of(oracle, optimizer, hyper, steps=STEPS)).scores(queries)
    assert relative_error(values(run, queries, compile=False), truth) <= ORACLE[torch.float64]


def test_the_older_weight_norm_is_exact(tmp_path: Path) -> None:
    """It computes the weight before each call, and leaves it with the module; the oracle has the newer one."""

    def build(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES)).double()

    with pytest.warns(FutureWarning):
        model = build(nn.utils.weight_norm)
    run = trained(tmp_path / "run", model, momentum=0.9)
    assert not model[0].weight.is_leaf  # type: ignore[union-attr]
    assert hg.verify(run).exact
    problem = replace(case("mlp_tanh"), build=lambda: build(nn.utils.parametrizations.weight_norm))
    truth = unroll(recipe_of(problem, steps=STEPS)).scores(problem.queries)
    assert relative_error(values(run, problem.queries, compile=False), truth) <= ORACLE[torch.float64]


def test_the_older_spectral_norm_is_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first = nn.utils.spectral_norm(nn.Linear(4, 6))
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, CLASSES)).double()
    run = trained(tmp_path / "run", model)
    with pytest.raises(hg.UnsupportedError, match=r"module '0' is a spectral norm"):
        hg.attribute(run, case("mlp_tanh").queries, progress=False)


class Checkpointed(nn.Module):
    """A part whose activations are computed again in the backward pass, dropout and all."""

    def __init__(self, reentrant: bool | None, dropout: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 6), nn.Linear(6, CLASSES), reentrant
        self.middle = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6), norm or nn.Identity(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.reentrant))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of any call without gradients
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_training_computes_again_are_kept_in_sweeps(
    reentrant: bool, dropout: float, tmp_path: Path
) -> None:
    """The oracle has the same model without checkpoints; both draw by a seed of their own."""

    def problem_of(how: bool | None) -> Case:
        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                return Checkpointed(how, dropout).double()

        return replace(case("dropout" if dropout else "mlp_tanh"), build=build)

    run = recorded(recipe_of(problem_of(reentrant)), tmp_path / "run")
    assert hg.verify(run).exact  # the replay checkpoints as training did
    queries = problem_of(None).queries
    truth = unroll(recipe_of(problem_of(None), steps=STEPS)).scores(queries)
    assert relative_error(values(run, queries, compile=False), truth) <= ORACLE[torch.float64]
    with activations_kept():
        assert not hasattr(torch_checkpoint.CheckpointFunction, "backward")
    assert hasattr(torch_checkpoint.CheckpointFunction, "backward")  # torch's own is back


def normalized(reentrant: bool | None, momentum: float | None) -> Case:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return Checkpointed(reentrant, 0.0, nn.BatchNorm1d(6, momentum=momentum)).double()

    return replace(case("mlp_tanh"), build=build)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_that_training_computes_twice_are_refused(
    reentrant: bool, momentum: float | None, tmp_path: Path
) -> None:
    """The backward pass runs that part again, and its batch counts twice: in no forward pass does it."""
    problem = normalized(reentrant, momentum)
    run = recorded(recipe_of(problem), tmp_path / "run")
    assert hg.verify(run).exact
    words = r"left another buffer 'middle\.3\..*Expected: .*Got: .*checkpoint.*around BatchNorm.*outside of"
    for method in ("exact", "hessian-free"):
        with pytest.raises(hg.UnsupportedError, match=words):
            hg.attribute(run, problem.queries, method=method, progress=False)
    with pytest.raises(hg.UnsupportedError, match=words):
        hg.hypergradients(run, [0], progress=False)


@pytest.mark.parametrize("steps", [0, 3])
def test_statistics_that_move_at_a_few_steps_only_are_looked_at_there(steps: int, tmp_path: Path) -> None:
    """Frozen from a step on, where the last checkpoint sees nothing; frozen throughout there is nothing to see."""

    def modes(model: nn.Module, t: int) -> None:
        model.get_submodule("middle.3").train(t < steps)

    problem = normalized(False, 0.3)
    run = recorded(recipe_of(problem, modes=modes), tmp_path / "run")
    if steps:
        with pytest.raises(hg.UnsupportedError, match="left another buffer"):
            hg.attribute(run, problem.queries, progress=False)
        return
    truth = unroll(recipe_of(normalized(None, 0.3), steps=STEPS, modes=modes)).scores(problem.queries)
    assert relative_error(values(run, problem.queries, compile=False), truth) <= ORACLE[torch.float64]


@pytest.mark.parametrize("still", [False, True])
def test_a_spectral_norm_that_trains_is_refused(still: bool, tmp_path: Path) -> None:
    """Held still, its vectors are constants, and finite differences by retraining agree."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
            return nn.Sequential(first, nn.Tanh(), nn.Linear(6, CLASSES)).double()

    def modes(model: nn.Module, t: int) -> None:
        if still:
            first: Any = model[0]  # type: ignore[index]
            first.parametrizations.eval()

    problem = replace(case("mlp_tanh"), build=build)
    run = recorded(recipe_of(problem, modes=modes), tmp_path / "run")
    assert hg.verify(run).exact
    if not still:
        with pytest.raises(hg.UnsupportedError, match=r"module '0.parametrizations.weight.0' is a spectral norm"):
            hg.attribute(run, problem.queries, progress=False)
        return
    found = values(run, problem.queries)
    batch, h = default_collate(problem.queries), 1e-5
    measured = []
    for way in (-h, h):
        weights = torch.ones(run.num_examples, dtype=torch.float64)
        weights[3] += way
        model, state = build().eval(), run.replay(weights=weights)
        model.load_state_dict({**state.params, **state.buffers})
        with torch.no_grad():
            measured.append(problem.loss(model, batch))
    assert relative_error(found[3], (measured[0] - measured[1]) / (2 * h)) <= FINITE_DIFFERENCE[torch.float64]
