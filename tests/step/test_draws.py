"""What one forward pass drew is what the next ones get, whichever operation drew it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Dirichlet, Gamma

from hydragrad.step.draws import HandOut, captured

X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
POSITIVE = X.abs() + 0.1

OPERATIONS = {
    "dropout": lambda: F.dropout(X, 0.4),
    "native_dropout of everything": lambda: torch.native_dropout(X, 1.0, True)[0],
    "dropout in place": lambda: F.dropout(X.clone(), 0.4, inplace=True),
    "native_dropout": lambda: torch.native_dropout(X, 0.4, True)[0],
    "feature dropout": lambda: F.dropout2d(X.view(2, 5, 1, 2), 0.4),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.4, training=True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "rrelu in place": lambda: F.rrelu(X.clone(), training=True, inplace=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "bernoulli": lambda: torch.bernoulli(POSITIVE / 2),
    "bernoulli_": lambda: torch.empty(3).bernoulli_(torch.tensor([0.2, 0.5, 0.8])),
    "rand": lambda: torch.rand(2, 3) + torch.rand((2, 3), dtype=torch.float64),
    "rand, then in place": lambda: torch.rand(3).mul_(2) + torch.bernoulli(POSITIVE / 2)[0, :3].div_(0.5),
    "rand_like": lambda: torch.rand_like(X) + torch.rand_like(X, dtype=torch.float32),
    "randn": lambda: torch.randn(2, 3) @ torch.randn((3,)),
    "randint": lambda: torch.randint(7, (3,)) + torch.randint(2, 9, (3,), dtype=torch.int32),
    "randint_like": lambda: torch.randint_like(X, 3, 9),
    "randperm": lambda: X[torch.randperm(4)],
    "normal": lambda: torch.normal(0.0, 1.0, (3,)) + torch.empty(3).normal_(1.0, 2.0),
    "uniform_": lambda: torch.empty(3).uniform_(-1, 1) + torch.empty(3).exponential_() + torch.empty(3).log_normal_(),
    "multinomial": lambda: torch.multinomial(POSITIVE, 2),
    "poisson": lambda: torch.poisson(POSITIVE),
    "binomial": lambda: torch.binomial(POSITIVE.ceil() * 5, POSITIVE / 2),
    "gamma": lambda: Gamma(POSITIVE, POSITIVE).rsample(),
    "dirichlet": lambda: Dirichlet(POSITIVE).rsample(),
    "initialization": lambda: nn.Linear(3, 4).weight.detach(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_drawn_is_handed_out(name):
    work = OPERATIONS[name]
    torch.manual_seed(5)
    expected = work()
    torch.manual_seed(5)
    first, draws = captured(work)
    assert draws
    assert torch.equal(first, expected)
    after = torch.get_rng_state()
    for _ in range(2):  # and not spoiled by having been used
        torch.manual_seed(6)
        untouched = torch.get_rng_state()
        with HandOut(draws) as dealer:
            found = work()
        dealer.finish()
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=1e-15, atol=0)
        assert torch.equal(torch.get_rng_state(), untouched)
    torch.manual_seed(5)
    work()
    assert torch.equal(torch.get_rng_state(), after)  # capturing draws no more and no less


def test_attention_without_dropout_draws_nothing():
    q: Tensor = torch.randn(1, 2, 4, 8)
    torch.manual_seed(0)
    assert captured(lambda: F.scaled_dot_product_attention(q, q, q))[1] == ()
