"""What cannot be done is refused, in words: what was expected, what was got, the likely cause, the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.errors import message
from hydragrad.hypergradient.queries import Columns, example_ids, group_numbers
from hydragrad.step import Update, known, register, safe_sqrt, supported
from tests.hypergradient.recorded import EPOCHS, Passes, recipe_of, recorded, values
from tests.oracles import finite_differences, unroll
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close
from tests.zoo import N_QUERY, N_TRAIN, case

PROBLEM = case("mlp_tanh")
QUERIES = PROBLEM.queries
METHODS = ["exact", "gauss-newton", "hessian-free"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("refusals") / "run")


@contextmanager
def refused(kind: type[hg.HydragradError], *words: str) -> Iterator[None]:
    """The error, its message holding all these words in this order."""
    with pytest.raises(kind) as caught:
        yield
    told, place = str(caught.value), 0
    for word in words:
        assert word in told[place:], f"no {word!r} after {told[:place]!r} in: {told}"
        place = told.index(word, place) + len(word)


def test_sentences_of_a_refusal_end_once() -> None:
    told = message("is it so?", expected="1 to 3.", got="a.b", cause="why not?", remedy="ask again")
    assert told == "is it so? Expected: 1 to 3. Got: a.b. Likely cause: why not? Remedy: ask again."
    assert message("zero.", expected=0, got=None) == "zero. Expected: 0."


def trained(
    path: Path,
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    dtype: torch.dtype = torch.float64,
    epochs: Any = EPOCHS,
    **hyper: Any,
) -> hg.Run:
    """Recorded in a plain loop, in the modes that the model is in, and loaded."""
    problem = case("mlp_tanh", torch.float32 if dtype == torch.float16 else dtype)
    samples = [(x.to(dtype), y) for x, y in problem.samples]
    made = optimizer(model.parameters(), **({"lr": 0.1} | hyper))
    with hg.record(path, model, made) as recording:
        for _ in epochs:
            loader = DataLoader(samples, batch_sampler=Passes([_]))  # type: ignore[arg-type]
            for batch in recording.batches(loader):
                made.zero_grad()
                problem.loss(model, batch).mean().backward()
                made.step()
    return hg.load(path, model=model, loss=problem.loss, data=samples)


def mlp(*middle: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Runs that cannot be differentiated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tmp_path):
    run = trained(tmp_path / "run", mlp(dtype=dtype), dtype=dtype)
    queries = [(x.to(dtype), y) for x, y in QUERIES]
    words = ("'0.weight'", "Expected: float32 or float64", f"Got: {dtype}", "Likely cause: half", "Remedy: ", "float32")
    with refused(hg.UnsupportedError, *words):
        hg.attribute(run, queries)
    with refused(hg.UnsupportedError, *words):
        hg.hypergradients(run, [0])
    with refused(hg.UnsupportedError, *words):
        hg.plan(run, 3)


def test_dropout_in_evaluation_mode_is_allowed(tmp_path):
    model = mlp(nn.Dropout(0.5))
    model[1].eval()
    frozen = mlp(nn.Identity())
    assert_close(
        values(trained(tmp_path / "dropout", model), QUERIES), values(trained(tmp_path / "none", frozen), QUERIES), SAME
    )


class Statistics(nn.BatchNorm1d):
    """BatchNorm with statistics of its own, as of a training before this one."""

    def __init__(self) -> None:
        super().__init__(6)
        generator = torch.Generator().manual_seed(4)
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.copy_(torch.randn(6, generator=generator))
        self.running_var.copy_(torch.rand(6, generator=generator) + 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm(training, tmp_path):
    recipe = replace(recipe_of(PROBLEM), model=mlp(Statistics()))
    recipe = replace(recipe, groups=[([n for n, _ in recipe.model.named_parameters()], {"lr": 0.1, "momentum": 0.9})])

    def modes(model: nn.Module, t: int) -> None:
        model.get_submodule("1").train(training)

    recipe = replace(recipe, modes=modes)
    run = recorded(recipe, tmp_path / "run")
    assert_close(values(run, QUERIES), unroll(recipe).scores(QUERIES), ORACLE)


def test_batchnorm_asked_before_its_first_checkpoint(tmp_path):
    """The buffers changed, though between 0 and step 3 no checkpoint shows it."""
    model = mlp(Statistics())
    groups = [([name for name, _ in model.named_parameters()], {"lr": 0.1, "momentum": 0.9})]
    recipe = replace(recipe_of(PROBLEM), model=model, groups=groups)
    run = recorded(recipe, tmp_path / "run")
    assert_close(values(run, QUERIES, step=3), unroll(recipe).scores(QUERIES, t=3), ORACLE)


class Adadelta(Update):
    """A formula as a user would write it, after torch's documentation of the optimizer."""

    def slots(self, hyper: Any) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    def step(self, w: Tensor, slots: Any, g: Tensor, hyper: Any, scalars: Any) -> tuple[Tensor, dict[str, Tensor]]:
        rho, eps = hyper["rho"], hyper["eps"]
        g = g + hyper["weight_decay"] * w
        square = rho * slots["square_avg"] + (1 - rho) * g * g
        delta = safe_sqrt(slots["acc_delta"] + eps) / safe_sqrt(square + eps) * g
        return w - hyper["lr"] * delta, {
            "square_avg": square,
            "acc_delta": rho * slots["acc_delta"] + (1 - rho) * delta * delta,
        }


def measured(state: hg.State) -> Tensor:
    """Every query's loss."""
    model = mlp().eval()
    model.load_state_dict({**state.params, **state.buffers})
    inputs, labels = (torch.stack(parts) for parts in zip(*QUERIES, strict=True))
    return PROBLEM.loss(model, (inputs, labels)).detach()


@pytest.fixture
def adadelta(tmp_path):
    with pytest.warns(UserWarning, match="Adadelta is recorded and replayed, but cannot be differentiated yet"):
        return trained(tmp_path / "run", mlp(), torch.optim.Adadelta, lr=1.0, rho=0.8, eps=1e-3, weight_decay=0.01)


def test_an_optimizer_without_a_formula(adadelta):
    assert hg.verify(adadelta).exact  # recorded and replayed it is
    assert "Adadelta" not in supported()
    words = ("Adadelta", "Expected: one of Adagrad, Adam, AdamW", "SGD", "Got: Adadelta", "Remedy: ", "step.register")
    with refused(hg.UnsupportedError, *words):
        hg.attribute(adadelta, QUERIES)
    with refused(hg.UnsupportedError, *words):
        hg.hypergradients(adadelta, [0])


def test_an_optimizer_whose_formula_was_registered(adadelta, monkeypatch):
    monkeypatch.setattr(known, "_OF_TORCH", dict(known._OF_TORCH))  # what is registered goes when the test does
    register("Adadelta", Adadelta())
    assert "Adadelta" in supported()
    scores = values(adadelta, QUERIES)
    direction = torch.randn(N_TRAIN, dtype=torch.float64)
    assert_close(finite_differences(adadelta, measured, direction, 1e-5), direction @ scores, FINITE_DIFFERENCE)
    forward = hg.hypergradients(adadelta, range(N_TRAIN), progress=False).scores(QUERIES).values
    assert_close(forward, scores, ORACLE)


# ---------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def root(model: nn.Module, batch: Any) -> Tensor:
    """sqrt at 0: an infinite slope, times 0."""
    return ((model(batch[0]) * 0).sum(1)).sqrt()


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_slope_of_the_measurement(run, method):
    words = ("derivative of a query", "Expected: finite", "Got: NaN", "Likely cause: ", "sqrt", "Remedy: ")
    with refused(hg.NonFiniteError, *words):
        hg.attribute(run, QUERIES, method=method, measurement=root)
    vectors = hg.hypergradients(run, [0], method=method, progress=False)
    with refused(hg.NonFiniteError, *words):
        vectors.scores(QUERIES, measurement=root)


def squared(model: nn.Module, batch: Any) -> Tensor:
    """A loss with a constant Hessian for a linear model: it diverges when told to, whatever comes."""
    return model(batch[0]).square().sum(1)


def linear(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).sum(1)


def diverging(path: Path, scale: float) -> hg.Run:
    """Each of 60 steps multiplies the weights, and the adjoint on its way back, by some -1e5."""
    model = nn.Linear(4, 1, bias=False).double()
    samples: Any = PROBLEM.samples
    optimizer = torch.optim.SGD(model.parameters(), lr=1e5)
    with torch.no_grad():
        model.weight.copy_(scale * torch.tensor([[0.1, -0.2, 0.3, 0.4]], dtype=torch.float64))
    with hg.record(path, model, optimizer) as recording:
        for _ in range(20):
            for batch in recording.batches(DataLoader(samples, 4)):
                optimizer.zero_grad()
                squared(model, batch).mean().backward()
                optimizer.step()
    assert model.weight.isfinite().all()
    return hg.load(path, model=model, loss=squared, data=samples)


@pytest.mark.parametrize("method", ["exact", "gauss-newton"])
def test_a_diverged_run(method, tmp_path):
    run = diverging(tmp_path / "run", 1e-200)
    words = ("adjoint is not finite at step ", "Expected: ", "Got: NaN or inf", "Likely cause: ", "Remedy: ", "step=")
    with refused(hg.NonFiniteError, *words):
        hg.attribute(run, QUERIES, method=method, measurement=linear, check=False)
    assert values(run, QUERIES, method, step=10, measurement=linear).isfinite().all()  # as the remedy says


def test_vectors_of_a_diverged_run(tmp_path):
    """The final weights are finite, just: their derivative, twenty times a share of them, is not."""
    end = diverging(tmp_path / "small", 1e-200).replay().params["weight"].abs().max()
    run = diverging(tmp_path / "large", 1e-200 * (1e308 / float(end)))
    with refused(hg.NonFiniteError, "hypergradient is not finite", "Likely cause: ", "Remedy: "):
        hg.hypergradients(run, range(N_TRAIN), progress=False)


# ---------------------------------------------------------------------------------------------------------------
# Queries and measurements


@pytest.mark.parametrize("lazy", [lambda: (q for q in QUERIES), lambda: iter(QUERIES)], ids=["generator", "iterator"])
def test_queries_without_a_length(run, lazy):
    words = ("no data set", "Expected: ", "__len__", "Got: ", "Remedy: give the data set (loader.dataset)")
    with refused(hg.MismatchError, *words):
        hg.attribute(run, lazy())
    with refused(hg.MismatchError, *words):
        hg.hypergradients(run, [0], progress=False).scores(lazy())


def test_a_plan_for_queries_without_a_length(run):
    with refused(hg.MismatchError, "no data set", "Expected: ", "__len__", "Got: ", "Remedy: "):
        hg.plan(run, (q for q in QUERIES))


def test_no_queries(run):
    with refused(hg.MismatchError, "no queries", "Expected: at least one", "Got: an empty"):
        hg.attribute(run, [])
    with refused(hg.MismatchError, "no queries", "Expected: at least one", "Got: an empty"):
        hg.hypergradients(run, [0], progress=False).scores([])


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "mean": (lambda model, batch: PROBLEM.loss(model, batch).mean(), "Got: shape []"),
    "too few": (lambda model, batch: PROBLEM.loss(model, batch)[1:], f"Got: shape [{N_QUERY - 1}]"),
    "transposed": (lambda model, batch: model(batch[0]).T, f"Got: shape [3, {N_QUERY}]"),
}


@pytest.mark.parametrize(("measurement", "got"), WRONG.values(), ids=list(WRONG))
def test_measurements_of_a_wrong_shape(run, measurement, got):
    words = ("measurement", "number per query", f"Expected: a tensor of shape [{N_QUERY}]", got, "Remedy: ")
    with refused(hg.MismatchError, *words):
        hg.attribute(run, QUERIES, measurement=measurement)
    with refused(hg.MismatchError, *words):
        hg.hypergradients(run, [0], progress=False).scores(QUERIES, measurement=measurement)


def test_a_measurement_that_is_no_tensor(run):
    with refused(hg.MismatchError, "number per query", "Expected: a tensor", "Got: list", "Remedy: "):
        hg.attribute(run, QUERIES, measurement=lambda model, batch: [1.0] * len(batch[0]))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# Rows and columns


BAD_IDS = {
    "twice": [3, 5, 3],
    "too large": [0, N_TRAIN],
    "negative": [-1, 2],
    "none": [],
    "fractions": torch.tensor([0.5, 1.5]),
    "table": torch.zeros(1, 1, dtype=torch.int64),
}


@pytest.mark.parametrize("train", BAD_IDS.values(), ids=list(BAD_IDS))
def test_rows_that_are_no_examples(run, train):
    got = torch.as_tensor(train).tolist()
    expected = "different integers" if got == BAD_IDS["twice"] else "integers from 0 to 11"
    with refused(hg.MismatchError, "train", f"Expected: {expected}", f"Got: {got}"):
        hg.attribute(run, QUERIES, train=train)


@pytest.mark.parametrize("examples", [BAD_IDS[key] for key in BAD_IDS if key != "twice"])
def test_vectors_of_no_examples(run, examples):
    got = torch.as_tensor(examples).tolist()
    with refused(hg.MismatchError, "examples", "Expected: integers from 0 to 11", f"Got: {got}"):
        hg.hypergradients(run, examples)


@pytest.mark.parametrize("mask", [[True] * 3, torch.zeros(N_TRAIN, dtype=torch.bool)], ids=["short", "of nothing"])
def test_masks_that_choose_no_examples(run, mask):
    words = (
        "does not name training examples",
        "or a mask of shape [12] that is true somewhere",
        "Got: a mask of",
    )
    with refused(hg.MismatchError, "train", *words):
        hg.attribute(run, QUERIES, train=mask)


def test_a_mask_chooses_the_same_examples_as_their_positions(run):
    mask = [i in (2, 3, 7) for i in range(N_TRAIN)]
    by_mask, by_position = (hg.attribute(run, QUERIES, train=rows, check=False) for rows in (mask, [2, 3, 7]))
    assert by_mask.train_ids.tolist() == [2, 3, 7]
    assert torch.equal(by_mask.values, by_position.values)
    assert hg.hypergradients(run, mask).examples.tolist() == [2, 3, 7]


@pytest.mark.parametrize("rows", [["a", "b"], [[1], [2, 3]]], ids=["names", "ragged"])
def test_rows_that_are_no_numbers(rows):
    with refused(hg.MismatchError, "train does not name training examples", f"Got: {rows}"):
        example_ids(rows, N_TRAIN, "train")


def test_groups_by_name_are_to_be_numbered(run):
    """As the remedy says."""
    names = [("odd", "even")[i % 2] for i in range(N_TRAIN)]
    with refused(hg.MismatchError, "groups does not number", "Got: groups = ['odd'", "[sorted(set(names)).index(name)"):
        group_numbers(names, N_TRAIN, "groups", "training example")
    with refused(hg.MismatchError, "aggregate does not number every query", "Got: aggregate = ['odd'"):
        Columns.make(names[:N_QUERY], N_QUERY)
    numbered = [sorted(set(names)).index(name) for name in names]
    assert numbered[:2] == [1, 0]
    assert hg.attribute(run, QUERIES, groups=numbered, check=False).values.shape == (2, N_QUERY)


def test_replays_that_are_no_number(run):
    for ask in (hg.attribute, hg.plan):
        with refused(hg.UnsupportedError, "replays is too small", "at least 1", "nan"):
            ask(run, QUERIES, replays=float("nan"))


def test_an_empty_path_is_not_the_current_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = PROBLEM.build()
    scores = hg.attribute(run, QUERIES, check=False)
    asked = [
        lambda: hg.record("", model, torch.optim.SGD(model.parameters(), 0.1)),
        lambda: hg.load("", model=model, loss=PROBLEM.loss, data=PROBLEM.samples),
        lambda: hg.attribute(run, QUERIES, resume=" "),
        lambda: hg.validate(run, scores, QUERIES, resume=""),
        lambda: hg.hypergradients(run, [1], path=""),
        lambda: scores.save(""),
    ]
    for ask in asked:
        with refused(hg.StoreError, " is empty", "a variable that was not set", 'the current folder is "."'):
            ask()
    assert not list(tmp_path.iterdir())


BAD_GROUPS = {
    "short": (torch.zeros(3, dtype=torch.int64), "shape [3]"),
    "float": (torch.zeros(N_TRAIN), "dtype torch.float32"),
    "negative": (torch.arange(N_TRAIN) - 1, ""),
    "table": (torch.zeros(N_TRAIN, 1, dtype=torch.int64), f"shape [{N_TRAIN}, 1]"),
}


@pytest.mark.parametrize(("groups", "got"), BAD_GROUPS.values(), ids=list(BAD_GROUPS))
def test_groups_that_number_no_examples(run, groups, got):
    words = ("groups does not number every training example", "Expected: 12 integers, 0 or larger", "Got: ", got)
    with refused(hg.MismatchError, *words, "Remedy: give the group of every training example"):
        hg.attribute(run, QUERIES, groups=groups)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_query_groups_that_number_no_queries(run, scale):
    words = ("aggregate does not number every query", "Expected: 4 integers", "'mean' or 'sum'", "Got: ", "Remedy: ")
    with refused(hg.MismatchError, *words):
        hg.attribute(run, QUERIES, aggregate=scale * torch.arange(N_QUERY))
    with refused(hg.MismatchError, *words):
        hg.hypergradients(run, [0], progress=False).scores(QUERIES, aggregate=[0, 1])


def test_groups_and_rows_together(run):
    with refused(hg.MismatchError, "groups and train together", "Remedy: give one of them"):
        hg.attribute(run, QUERIES, groups=torch.zeros(N_TRAIN, dtype=torch.int64), train=[0])


def test_an_unknown_aggregate(run):
    words = ("aggregate", "Expected: ", "'mean' or 'sum'", "Got: ", "median")
    with refused(hg.MismatchError, *words):
        hg.attribute(run, QUERIES, aggregate="median")
    with refused(hg.MismatchError, *words):
        hg.hypergradients(run, [0], progress=False).scores(QUERIES, aggregate="median")


def test_an_unknown_method(run):
    words = ("unknown method", "Expected: one of exact, gauss-newton, hessian-free", "Got: 'newton'")
    with refused(hg.UnsupportedError, *words):
        hg.attribute(run, QUERIES, method="newton")
    with refused(hg.UnsupportedError, *words):
        hg.hypergradients(run, [0], method="newton")


@pytest.mark.parametrize("step", [0, -1, 8])
def test_a_step_that_was_not_taken(run, step):
    words = ("no such step", "Expected: step=1 to 7", f"Got: step={step}")
    with refused(hg.UnsupportedError, *words):
        hg.attribute(run, QUERIES, step=step)
    with refused(hg.UnsupportedError, *words):
        hg.hypergradients(run, [0], step=step)
