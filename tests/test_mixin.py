"""HessianRegularizationMixin: the same penalty in a hand-written training step."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nets import CPU, Classifier, Manual, Mixed, Silent, data, fit, task_loss, weights
from recorders import Recorder

import lightning_hessian as lh


def trace_regularizer(strength=0.02):
    return lh.HessianRegularizer(lh.HessianTrace(), strength=strength)


class Automatic(Mixed):
    """Its loss is in a dictionary."""

    def training_step(self, batch, batch_idx):
        return self.regularized(lambda: {"loss": task_loss(self, batch)})


def test_manual_optimization_equals_the_callback():
    manual, automatic = Manual(trace_regularizer()), Classifier()
    recorder = Recorder()
    fit(manual, [recorder])
    fit(automatic, [trace_regularizer()])
    torch.testing.assert_close(weights(manual), weights(automatic), rtol=1e-10, atol=1e-10)
    assert "curvature/hessian_trace" in recorder.rows[0]


def test_automatic_optimization_equals_the_callback():
    regularizer = trace_regularizer()
    mixed, automatic = Automatic(regularizer), Classifier()
    fit(mixed)
    fit(automatic, [regularizer])
    assert torch.equal(weights(mixed), weights(automatic))


def test_every_n_steps_counts_batches_where_several_optimizers_step():
    class Two(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

        def training_step(self, batch, batch_idx):
            for optimizer, regularizer in zip(self.optimizers(), self.both, strict=True):
                self.regularizer = regularizer
                optimizer.zero_grad()
                self.manual_backward(self.regularized(lambda: task_loss(self, batch)))
                optimizer.step()

    acted = []

    class Watched(lh.HessianTrace):
        def value(self, context):
            acted.append((self, context.probes.micro_batch))
            return super().value(context)

    module = Two(trace_regularizer())
    module.both = [lh.HessianRegularizer(Watched(), strength=0.01, every_n_steps=2) for _ in range(2)]
    fit(module)
    for regularizer in module.both:
        assert [batch for penalty, batch in acted if penalty is regularizer.penalty] == [0, 2, 4]


def test_a_validation_step_may_use_the_regularized_loss():
    class Shared(Automatic):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    module = Shared(trace_regularizer())
    trainer = L.Trainer(**CPU, max_epochs=1)
    trainer.fit(module, data(), data())


def test_callback_and_mixin_together_are_refused():
    regularizer = trace_regularizer()
    with pytest.raises(MisconfigurationException, match="Keep one"):
        fit(Automatic(regularizer), [lh.HessianRegularizer(lh.HessianTrace())])


def test_several_regularizers():
    halves = [trace_regularizer(0.01) for _ in range(2)]
    both, one = Automatic(halves), Automatic(trace_regularizer())
    fit(both)
    fit(one)
    torch.testing.assert_close(weights(both), weights(one), rtol=1e-10, atol=1e-10)


def test_without_a_regularizer_the_error_says_how_to_set_it():
    with pytest.raises(MisconfigurationException, match=r"self\.regularizer = HessianRegularizer"):
        fit(Automatic(None))


def test_a_frozen_model_is_refused():
    module = Manual(trace_regularizer())
    module.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="requires_grad_"):
        fit(module)


def test_strength_0_is_bit_equal_to_no_penalty():
    module, plain = Automatic(trace_regularizer(0.0)), Classifier()
    fit(module)
    fit(plain)
    assert torch.equal(weights(module), weights(plain))


class Forgetful(Automatic):
    training_step = Silent.training_step


def test_a_regularizer_that_is_never_used_is_warned_of_once():
    regularizer = trace_regularizer()
    for given in (regularizer, [regularizer]):
        with pytest.warns(UserWarning, match=r"without a call of `self\.regularized`") as warned:
            fit(Forgetful(given), max_epochs=3)
        assert len([one for one in warned if "self.regularized" in str(one.message)]) == 1


@pytest.mark.parametrize(
    "module", [Forgetful(None), Manual(trace_regularizer()), Automatic(lh.HessianRegularizer(lh.HessianTrace()))]
)
def test_one_that_is_used_or_not_there_is_not_warned_of(module):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*self.regularized")
        fit(module, max_epochs=2)


def test_a_second_fit_is_looked_at_anew():
    class Changes(Automatic):
        forgets = False

        def training_step(self, batch, batch_idx):
            step = Forgetful.training_step if self.forgets else Automatic.training_step
            return step(self, batch, batch_idx)

    module = Changes(lh.HessianRegularizer(lh.HessianTrace()))
    fit(module)
    module.forgets = True
    with pytest.warns(UserWarning, match=r"without a call of `self\.regularized`"):
        fit(module)


def test_the_modules_own_callbacks_stay():
    class Own(Automatic):
        def configure_callbacks(self):
            return [recorder, *super().configure_callbacks()]

    recorder = Recorder()
    fit(Own(lh.HessianRegularizer(lh.HessianTrace())))
    assert len(recorder.rows) == 6


@pytest.mark.parametrize("kind", [Automatic, Forgetful])
@pytest.mark.parametrize("given", [lh.HessianTrace(), [lh.HessianTrace()], lh.HessianRegularizer, 1e-3], ids=str)
def test_a_regularizer_that_is_none_gives_an_error_that_says_what_it_must_be(kind, given):
    module = kind(given)
    with pytest.raises(MisconfigurationException, match=r"\.regularizer=.* must be a HessianRegularizer or a list"):
        fit(module)
    with pytest.raises(MisconfigurationException, match="must be a HessianRegularizer"):
        module.regularized(lambda: torch.zeros(()))


class InTurn(Manual):
    """Two losses in a step, each with a regularizer of its own, set before its call."""

    def __init__(self, *regularizers):
        super().__init__()
        self.in_turn = regularizers

    def training_step(self, batch, batch_idx):
        for regularizer in self.in_turn:
            self.regularizer = regularizer
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.regularized(lambda: task_loss(self, batch)))
            optimizer.step()


def test_regularizers_that_take_turns_go_on_from_where_they_were():
    penalties = [lh.HessianNorm(), lh.HessianNorm(method="central_difference")]
    starts = []

    class Counts(lh.HessianNorm):
        def load_state_dict(self, state):
            starts.append(self)
            super().load_state_dict(state)

    counting = Counts()
    module = InTurn(*(lh.HessianRegularizer(p, strength=1e-3) for p in (*penalties, counting)))
    fit(module, max_steps=-1, max_epochs=1)
    assert starts == [counting]
    assert all(penalty.state_dict() for penalty in penalties)
