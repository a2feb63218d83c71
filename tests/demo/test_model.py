"""The model of the demonstration: its gradients, its bits, its learning."""

from typing import Any

import numpy as np
import pytest

from gpuckpt.demo.adam import Adam
from gpuckpt.demo.digests import digests
from gpuckpt.demo.layers import Array
from gpuckpt.demo.model import Model, initial
from gpuckpt.demo.settings import Settings
from gpuckpt.demo.text import SYMBOLS, Batches, corpus
from gpuckpt.demo.train import Trainer

SMALL = Settings(batch=2, context=5, width=8, depth=2, heads=2, corpus_nbytes=50_000)


@pytest.fixture(scope="module")
def problem():
    """Random parameters in float64, a batch, a dropout, and the gradients that the model finds."""
    generator = np.random.default_rng(3)
    parameters = {
        name: generator.standard_normal(array.shape) * 0.5
        for name, array in initial(np, SMALL, "float64").items()
    }
    shape = (SMALL.batch, SMALL.context)
    inputs, targets = (generator.integers(SYMBOLS, size=shape) for _ in range(2))
    keep = generator.integers(2, size=(SMALL.batch * SMALL.context, SMALL.width)) * 1.5
    model = Model(np, SMALL)
    _, gradients = model.loss_and_gradients(parameters, inputs, targets, keep)

    def loss_at(name: str, moved: Array) -> Array:
        return model.loss_and_gradients({**parameters, name: moved}, inputs, targets, keep)[0]

    return parameters, gradients, loss_at


@pytest.mark.parametrize("name", initial(np, SMALL))
def test_a_gradient_agrees_with_finite_differences(problem, name):
    parameters, gradients, loss_at = problem
    here, gradient = parameters[name], gradients[name]
    assert gradient.shape == here.shape
    generator, small = np.random.default_rng(4), 1e-5
    for _ in range(3):
        direction = generator.standard_normal(here.shape)
        ahead = loss_at(name, here + small * direction)
        behind = loss_at(name, here - small * direction)
        slope = (ahead - behind) / (2 * small)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_a_character_sees_none_of_those_after_it():
    model, settings = Model(np, SMALL), SMALL
    parameters = initial(np, settings, "float64")
    keep = np.ones((settings.context, settings.width))
    inputs = np.arange(settings.context)[None]

    def first_row(later: Array) -> Array:
        changed = np.concatenate([inputs[:, :1], later], axis=1)
        x = (parameters["symbol"][changed] + parameters["place"]).reshape(keep.shape)
        return model._block(parameters, "block0", x, 1)[0][0]

    assert np.array_equal(first_row(inputs[:, 1:]), first_row(inputs[:, 1:] + 77))


def trained(steps: int, settings: Settings = SMALL) -> tuple[dict[str, Any], list[float]]:
    trainer = Trainer(np, settings)
    state = trainer.initial_state()
    losses = []
    for _ in range(steps):
        loss, gradients = trainer.forward_backward(state)
        trainer.optimizer_step(state, gradients)
        losses.append(loss)
    return state, losses


def test_the_same_seed_gives_the_same_bits():
    first, first_losses = trained(5)
    before = digests(first)
    second, second_losses = trained(5)
    assert first_losses == second_losses
    assert before == digests(second)


def test_another_seed_gives_other_bits():
    settings = Settings(batch=2, context=5, width=8, depth=2, heads=2, seed=21)
    assert trained(1)[1] != trained(1, settings)[1]


def test_the_loss_falls_within_a_few_steps():
    settings = Settings(batch=4, context=32, width=64, depth=2, corpus_nbytes=50_000)
    losses = trained(60, settings)[1]
    assert losses[0] == pytest.approx(np.log(SYMBOLS), abs=0.3)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.5


def test_adam_moves_parameters_in_their_own_memory_by_the_rate_at_most():
    adam = Adam(np, rate=0.25, warmup=1)
    parameters = {"w": np.array([1.0, -2.0, 3.0])}
    memory, before = parameters["w"], parameters["w"].copy()
    moments = adam.initial(parameters)
    adam.update(parameters, moments, {"w": np.array([1e-3, -5.0, 0.0])})
    assert parameters["w"] is memory
    assert moments["step"] == 1
    np.testing.assert_allclose(memory - before, [-0.25, 0.25, 0.0], rtol=1e-4)


def test_the_corpus_is_the_same_bytes_every_time_and_no_more_than_asked_for():
    assert len(corpus(10_000)) == 10_000
    assert np.array_equal(corpus(10_000), corpus(20_000)[:10_000])


def test_batches_go_on_drawing_where_their_state_was_taken():
    text = corpus(10_000)
    batches = Batches(text, seed=1)
    batches.draw(2, 8)
    state = batches.state_dict()
    expected = batches.draw(2, 8)
    other = Batches(text, seed=2)
    other.load_state_dict(state)
    for mine, theirs in zip(other.draw(2, 8), expected, strict=True):
        assert np.array_equal(mine, theirs)


def test_targets_are_the_characters_that_follow():
    inputs, targets = Batches(corpus(10_000), seed=1).draw(3, 8)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_digests_tell_one_bit_of_one_tensor_apart():
    state, _ = trained(1)
    before = digests(state)
    state["optimizer"]["exp_avg_sq"]["head.bias"].view(np.uint32)[7] ^= 1
    after = digests(state)
    assert [name for name in before if before[name] != after[name]] == [
        "optimizer/exp_avg_sq/head.bias"
    ]


@pytest.mark.parametrize("draw", [np.random.random, Trainer(np, SMALL).forward_backward])
def test_digests_tell_generators_apart_that_have_drawn_more(draw):
    state, _ = trained(1)
    before = digests(state)
    draw(state) if draw is not np.random.random else draw()
    assert before != digests(state)
