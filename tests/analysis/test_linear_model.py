"""The linear model: closed forms against sampling and numerical optimisation, and what training reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gaintune.analysis import LinearModelOptions, Subject, run_experiment, write_result
from gaintune.analysis.linear_model.report import checks, figure, markdown, record, result, summary, table
from gaintune.analysis.linear_model.survey import LinearModel, Losses, student
from gaintune.errors import ConfigError
from support import refused

SAMPLES = 200_000


def general(seed: int = 0, d_in: int = 5, d_out: int = 3, rank: int = 2) -> LinearModel:
    """Means that are neither equal nor opposite, a full covariance, and a map that is not square."""
    generator = np.random.default_rng(seed)
    root, weight = generator.standard_normal((d_in, d_in)) / 2, generator.standard_normal((d_out, d_in))
    update = generator.standard_normal((d_out, rank)) @ generator.standard_normal((rank, d_in))
    means = (generator.standard_normal(d_in), generator.standard_normal(d_in))
    return LinearModel(weight, update, *means, root @ root.T + 0.3 * np.eye(d_in))


def drawn(model: LinearModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, which are of the first population, and the targets less `W x`: from the definition alone."""
    inputs, first = model.sample(SAMPLES, torch.Generator().manual_seed(1))
    return inputs, first, first.double().unsqueeze(1) * (inputs @ torch.from_numpy(model.update).T)


def agrees(losses: Losses, given: torch.Tensor, wanted: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether losses are within four standard errors of the mean squared errors on samples of each population."""
    errors = (given - wanted).square().mean(1)
    pairs = ((errors[first], losses.in_domain), (errors[~first], losses.retention))
    return all(abs(float(e.mean()) - loss) < 4 * float(e.std()) / math.sqrt(len(e)) for e, loss in pairs)


def test_the_sample_has_the_means_covariance_and_shares_it_claims():
    model = general()
    inputs, first, _ = drawn(model)
    assert float(first.double().mean()) == pytest.approx(0.5, abs=0.005)
    for mean, chosen in ((model.mean1, first), (model.mean0, ~first)):
        assert inputs[chosen].mean(0).numpy() == pytest.approx(mean, abs=0.02)
        assert torch.cov(inputs[chosen].T).numpy() == pytest.approx(model.covariance, abs=0.03)


@pytest.mark.parametrize("model", [general(), general(7), LinearModel.draw(8, 2, 3.0, 0)])
def test_the_best_fixed_correction_is_the_least_squares_solution(model):
    inputs, first, wanted = drawn(model)
    solution = torch.linalg.lstsq(inputs, wanted).solution.T
    assert model.best_fixed() == pytest.approx(solution.numpy(), abs=0.03)
    losses = model.fixed_losses(model.best_fixed())
    assert agrees(losses, inputs @ torch.from_numpy(model.best_fixed()).T, wanted, first)


@pytest.mark.parametrize("model", [general(), LinearModel.draw(6, 2, 2.0, 3)])
def test_no_fixed_correction_does_better_by_numerical_optimisation(model):
    first, second = (torch.from_numpy(moment) for moment in model.second_moments())
    update = torch.from_numpy(model.update)
    free = torch.zeros_like(update, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss() -> torch.Tensor:
        missed = free - update
        return (torch.trace(missed @ first @ missed.T) + torch.trace(free @ second @ free.T)) / (2 * len(update))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(step)
    best = model.best_fixed()
    assert free.detach().numpy() == pytest.approx(best, abs=1e-5)
    assert model.fixed_losses(best).total == pytest.approx(float(loss().detach()), rel=1e-8)
    assert np.linalg.matrix_rank(best) <= np.linalg.matrix_rank(model.update)


def test_half_the_update_is_best_for_opposite_or_equal_means_and_not_otherwise():
    model = general()
    for mean0 in (-model.mean1, model.mean1):
        symmetric = LinearModel(model.weight, model.update, model.mean1, mean0, model.covariance)
        assert symmetric.best_fixed() == pytest.approx(model.update / 2, abs=1e-12)
        losses, moment = symmetric.fixed_losses(symmetric.best_fixed()), symmetric.second_moments()[0]
        assert losses.in_domain == pytest.approx(losses.retention)
        expected = np.trace(model.update @ moment @ model.update.T) / 4 / len(model.update)  # equation 20
        assert losses.total == pytest.approx(expected)
    assert np.abs(model.best_fixed() - model.update / 2).max() > 0.01


@pytest.mark.parametrize("model", [general(), general(7), LinearModel.draw(8, 2, 3.0, 0)])
def test_the_bayes_losses_are_those_of_the_posterior_on_samples(model):
    inputs, first, wanted = drawn(model)
    covariance, means = torch.from_numpy(model.covariance), map(torch.from_numpy, (model.mean1, model.mean0))
    normal = [torch.distributions.MultivariateNormal(mean, covariance) for mean in means]
    posterior = torch.softmax(torch.stack([one.log_prob(inputs) for one in normal]), dim=0)[0]
    given = posterior.unsqueeze(1) * (inputs @ torch.from_numpy(model.update).T)
    assert torch.allclose(model.bayes_correction(inputs), given, atol=1e-9)
    assert agrees(model.bayes_losses(), given, wanted, first)


def test_the_bayes_gate_of_opposite_means_is_the_papers():
    model = LinearModel.draw(8, 2, 3.0, 0)
    direction, offset = model.bayes_gate()
    assert direction == pytest.approx(2 * model.mean1) and offset == 0


@pytest.mark.parametrize("separation", [1e-3, 1.0, 10.0, 40.0])
def test_the_bayes_loss_agrees_with_a_finer_quadrature_and_lies_between_zero_and_the_floor(separation):
    model = LinearModel.draw(4, 2, separation, 1)
    scores, variance = np.linspace(-60, 60, 4_000_001), separation**2
    spread = np.sum(model.update[:, 1:] ** 2) + np.sum(model.update[:, 0] ** 2) * (scores / separation) ** 2
    density = np.exp(-((scores - variance / 2) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    expected = np.sum(density * spread / (1 + np.exp(scores)) ** 2) * (scores[1] - scores[0]) / 4
    found = model.bayes_losses()
    if separation >= 1:  # below that the grid of this test is too coarse for the density
        assert found.in_domain == pytest.approx(expected, rel=1e-6)
    assert found.in_domain == pytest.approx(found.retention)
    assert 0 < found.total <= model.fixed_losses(model.best_fixed()).total


def test_populations_that_are_the_same_leave_nothing_to_gate():
    model = general()
    same = LinearModel(model.weight, model.update, model.mean1, model.mean1, model.covariance)
    assert same.bayes_losses().total == pytest.approx(same.fixed_losses(same.best_fixed()).total)
    nearly = LinearModel(model.weight, model.update, model.mean1, model.mean1 + 1e-4, model.covariance)
    assert nearly.bayes_losses().total == pytest.approx(same.bayes_losses().total, rel=1e-4)


def test_losses_of_any_correction_agree_with_the_exact_ones():
    model = general()
    doubled = torch.from_numpy(model.update * 2)  # far from the Bayes correction: nearly all of its loss is sampled
    exact = model.fixed_losses(model.update * 2)
    found = model.losses(lambda inputs: inputs @ doubled.T, samples=SAMPLES, seed=0)
    assert found.in_domain == pytest.approx(exact.in_domain, rel=0.02)
    assert found.retention == pytest.approx(exact.retention, rel=0.02)
    bayes = model.losses(model.bayes_correction, samples=100, seed=0)
    assert bayes.total == pytest.approx(model.bayes_losses().total, rel=1e-12)


@pytest.fixture(scope="module")
def short():
    settings = LinearModelOptions(dimension=8, rank=2, steps=600, seeds=2, lr=0.02)
    return settings, run_experiment(settings)


def test_training_reaches_the_closed_forms(short):
    _, results = short
    assert [(check.claim, check.worst) for check in checks(results) if not check.holds] == []
    rows = {row.name: row for row in summary(results)}
    assert rows["LoRA"].to_fixed[1] >= 1 and rows["full"].to_fixed[1] >= 1  # a floor
    assert rows["DISeL"].to_bayes[1] >= 1
    assert rows["DISeL"].losses.in_domain < 0.6 * rows["LoRA"].losses.in_domain
    assert rows["DISeL"].losses.retention < 0.6 * rows["LoRA"].losses.retention


def test_trained_gates_follow_the_bayes_gate(short):
    _, results = short
    for seed in results:
        gates = next(one.gates for one in seed.trained if one.gates is not None)
        assert gates.shape == (201, 2) and np.abs(gates - seed.bayes_gate[:, None]).mean() < 0.05


def test_the_same_settings_give_the_same_numbers_and_files(short, tmp_path):
    settings = LinearModelOptions(dimension=4, rank=1, steps=20, seeds=1)
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)
        write_result("linear-model", result(run_experiment(settings), Subject(), settings), tmp_path / name)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == [f"linear-model.{kind}" for kind in ("csv", "json", "md", "png", "svg")]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tables_hold_losses_and_verdicts(short):
    settings, results = short
    text = markdown(settings, results)
    assert "| DISeL |" in text and "dimension 8" in text and text.count("yes (worst seed") == 4
    assert "presuppose" not in text, "few steps were enough"
    failing = [replace(each, bayes=Losses(1e-9, 1e-9)) for each in results]
    assert "presuppose 1500 training steps" in markdown(settings, failing)
    assert "presuppose" not in markdown(LinearModelOptions(dimension=8), failing)
    frame = table(results)
    assert len(frame) == 2 * 5
    assert frame["loss"].to_numpy() == pytest.approx(((frame["in_domain"] + frame["retention"]) / 2).to_numpy())
    assert [one["method"] for one in record(settings, results)["seeds"][0]["trained"]] == ["full", "lora", "disel"]
    labels = [text.get_text() for axes in figure(results).axes for text in axes.texts]
    assert "best fixed correction" in labels and "Bayes-optimal correction" in labels


def test_every_student_starts_at_the_pretrained_map():
    settings = LinearModelOptions(dimension=6, rank=2)
    problem = LinearModel.draw(6, 2, 3.0, 0)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for method in ("full", "lora", "disel"):
        expected = inputs @ torch.from_numpy(problem.weight).float().T
        assert torch.allclose(student(problem, method, settings, 0)(inputs), expected, atol=1e-6)


@pytest.mark.parametrize(("changes", "named"), [
    ({"rank": 9, "dimension": 8}, "rank"), ({"separation": 0.0}, "separation"), ({"seeds": 0}, "seeds"),
    ({"lr": math.nan}, "lr"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, named):
    refused(ConfigError, named, LinearModelOptions.read, changes, "here")
