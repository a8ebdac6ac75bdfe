"""Language models on the command line: the data, the perplexity, every regularizer, and what is refused."""

import sys
import types

import pytest
import torch
from test_cli import run  # noqa: F401
from torch.nn import functional as F

from lightning_hessian.cli.in_memory import DataUnavailable
from lightning_hessian.cli.language_model import LanguageModel
from lightning_hessian.cli.sequence_models import GPT, LSTM
from lightning_hessian.cli.text import PythonTopics, WikiText2

QUICK = [
    *("data=text", "data.train_samples=64", "data.batch_size=16", "data.length=8", "model.width=8", "optimizer=adamw"),
    *(
        "logger=none",
        "trace.samples=16",
        "trace.probes=2",
        "+trainer.limit_val_batches=2",
        "+trainer.limit_test_batches=2",
    ),
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    "trainer.max_epochs=1",
]
MODELS = {"lstm": ["model=lstm"], "gpt": ["model=gpt", "model.depth=1", "model.heads=2"]}


def test_windows_follow_each_other_and_the_parts_do_not_overlap():
    data = PythonTopics(length=32)
    data.setup("fit")
    data.test_dataloader()
    texts = {}
    for part, windows in data._sets.items():
        assert windows.inputs.shape == windows.targets.shape
        assert torch.equal(windows.inputs[:, 1:], windows.targets[:, :-1])
        assert torch.equal(windows.inputs[1:, 0], windows.targets[:-1, -1])
        assert windows.inputs.max() < data.classes
        texts[part] = "".join(data._characters[i] for i in windows.inputs.flatten().tolist())
    assert len(texts["train"]) > 6 * max(len(texts["val"]), len(texts["test"]))
    assert len(texts["train"]) > 200_000
    for part in ("val", "test"):
        pieces = [texts[part][i : i + 200] for i in range(0, len(texts[part]) - 200, 200)]
        assert not any(piece in texts["train"] for piece in pieces)


@pytest.mark.parametrize("network", [LSTM, GPT])
def test_a_later_token_changes_no_earlier_prediction(network):
    net = network(classes=20, **({"length": 8, "heads": 2} if network is GPT else {}), width=8).eval()
    tokens = torch.randint(0, 20, (3, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    same = (net(tokens) == net(changed)).all(dim=2).all(dim=0)
    assert same.tolist() == [True] * 5 + [False] * 3


def test_the_perplexity_is_the_exponential_of_the_mean_cross_entropy_per_token():
    net = LSTM(classes=20, width=8)
    model = LanguageModel(net, 20)
    tokens, following = torch.randint(0, 20, (2, 6, 8))
    metric = model.metrics_of("test")["perplexity"]
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(*model.logits_and_targets((tokens[part], following[part])))
    expected = F.cross_entropy(net(tokens).transpose(1, 2), following)
    torch.testing.assert_close(metric.compute(), expected.exp())
    torch.testing.assert_close(model.loss((tokens, following)), expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "regularizer",
    [
        ["regularizer=none", "baseline=label_smoothing"],
        [],
        ["regularizer.penalty.method=taylor"],
        ["regularizer.penalty.method=two_pass", "regularizer.strength=share:0.1"],
        ["regularizer=hessian_norm"],
        ["regularizer=sam", "baseline=confidence_penalty"],
        ["regularizer=input_hessian"],
        ["regularizer=input_gradient"],
        ["regularizer=jacobian", "regularizer.strength=auto"],
        ["regularizer=input_gradient_hessian"],
    ],
    ids=" ".join,
)
def test_every_regularizer_trains_a_language_model(run, model, regularizer):  # noqa: F811
    at_once = [] if "regularizer=none" in regularizer else ["regularizer.warmup_steps=0"]
    out, err, status = run(*QUICK, *MODELS[model], *regularizer, *at_once)
    assert status == 0, err
    numbers = {line[:20].strip(): float(line[20:]) for line in out.splitlines() if line.startswith("test ")}
    assert numbers["test perplexity"] == pytest.approx(torch.tensor(numbers["test loss"]).exp().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=mlp"], "needs shape, which PythonTopics does not provide: the model is for other data"),
        (["model=gpt", "data=digits"], "needs length, which Digits does not provide"),
        (["model=lstm", "baseline=mixup"], "unexpected keyword argument 'mix'"),
        (["model=lstm", "data.length=100000000"], "data.length=100000000, but the train text has"),
        (["model=lstm", "data.train_samples=100000000"], "data.train_samples=100000000, but there are only"),
        (["model=lstm", "data.length=0"], "data: length=0"),
        (["model=lstm", "data=digits"], "Language models take tokens, whole numbers of shape (batch, length)"),
        (["model=gpt", "+model.length=4"], "GPT has positions for 4 tokens, not for 8"),
        (["model=gpt", "model.heads=3"], "model: heads=3 must divide width=8"),
        (["model=lstm", "robustness=pgd", "regularizer=none"], "integers such as token ids have no derivatives"),
        (["model=lstm", "data=wikitext2"], "WikiText-2 needs Hugging Face's package datasets"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_gives_one_line(run, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.setitem(sys.modules, "datasets", None)
    of_text = ("data=text", "data.length") if "data=digits" in arguments else ()
    _, err, status = run(*(one for one in QUICK if not one.startswith(of_text)), *arguments)
    lines = [line for line in err.splitlines() if line.startswith("lightning-hessian: ")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_wikitext_is_read_by_word(monkeypatch):
    lines = {"train": ["", " = Title = ", " one two <unk> one "], "validation": [" two = "], "test": [" one "]}
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name, part, cache_dir: {k: {"text": v} for k, v in lines.items()}
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(WikiText2, "classes", 6)
    data = WikiText2(length=2, batch_size=2)
    data.prepare_data()
    # <eos> = Title = <eos> one two <unk> one <eos>
    assert data.tokens("train").tolist() == [0, 1, 2, 1, 0, 3, 4, 5, 3, 0]
    assert data.tokens("validation").tolist() == [4, 1, 0]
    data.setup("fit")
    assert data._sets["val"].targets.tolist() == [[1, 0]]


def test_wikitext_that_cannot_be_had_says_so(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    library = types.ModuleType("datasets")
    library.load_dataset = refuse
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(DataUnavailable, match=r"could not be downloaded \(no network\)\. Use data=text"):
        WikiText2().prepare_data()
