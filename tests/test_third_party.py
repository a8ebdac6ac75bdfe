"""Models of timm, transformers and torchvision, unchanged, with random weights: Taylor mode against autograd."""

import lightning as L
import pytest
import timm
import torch
import torchvision
import transformers
from agreement import assert_equal
from nets import fit, weights
from oracles import relative_error
from timm.models.mlp_mixer import MlpMixer
from torch.nn import functional as F

import lightning_hessian as lh

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # PyTorch's own forward-mode formulas are scripts.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]

CLASSES, WORDS = 5, 50
GENERATOR = torch.Generator().manual_seed(1)
SMALL = torch.randn(4, 3, 32, 32, generator=GENERATOR, dtype=torch.float64)
LARGE = torch.randn(4, 3, 64, 64, generator=GENERATOR, dtype=torch.float64)
PIXELS = torch.randint(CLASSES, (4, 64, 64), generator=GENERATOR)
TOKENS = torch.randint(WORDS, (2, 7), generator=GENERATOR)
ATTENDED = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def classified(images):
    return lambda net: F.cross_entropy(net(images), torch.arange(len(images)))


def segmented(net):
    return F.cross_entropy(net(LARGE)["out"], PIXELS)


def predicted(net):
    return net(input_ids=TOKENS, labels=TOKENS).loss


def predicted_with_padding(net):
    labels = TOKENS.masked_fill(ATTENDED == 0, -100)
    return net(input_ids=TOKENS, attention_mask=ATTENDED, labels=labels).loss


# On small images a deep network's batch norms see a pixel per sample, and the gradient loses digits.
IMAGE_MODELS = {
    "timm resnet10t": (lambda: timm.create_model("resnet10t", num_classes=CLASSES), classified(SMALL)),
    "timm vit_tiny": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, depth=2, drop_rate=0.1, drop_path_rate=0.2
        ),
        classified(SMALL),
    ),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=CLASSES), classified(SMALL)),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=CLASSES), classified(LARGE)),
    "timm mixer": (
        lambda: MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=64),
        classified(SMALL),
    ),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), classified(SMALL)),
    "torchvision mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES),
        classified(LARGE),
    ),
    "torchvision lraspp_mobilenet_v3_large": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=CLASSES
        ),
        segmented,
    ),
}

DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
WORDY = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
# transformers computes some parts in float32 also in a float64 model: the loss of GPT-2 and Llama, Llama's norms and
# softmax, T5's norms and softmax. There the two methods differ by float32 rounding.
EXACT, ROUNDED = 1e-9, 1e-5
LANGUAGE_MODELS = {
    "BERT": (transformers.BertForMaskedLM, DEEP, predicted_with_padding, EXACT),
    "GPT-2": (transformers.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}, predicted, ROUNDED),
    "Llama": (transformers.LlamaForCausalLM, {**DEEP, "num_key_value_heads": 2}, predicted, ROUNDED),
    "T5": (
        transformers.T5ForConditionalGeneration,
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        predicted_with_padding,
        ROUNDED,
    ),
}


def language_model(name, attention):
    kind, options, *_ = LANGUAGE_MODELS[name]
    return kind(kind.config_class(**WORDY, **options, attn_implementation=attention))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_models_for_images(name):
    make, loss = IMAGE_MODELS[name]
    assert_equal(make().double(), loss)


# T5 has only the first in transformers 5.0.
ATTENTION = [(name, kind) for name in LANGUAGE_MODELS for kind in ("eager", "sdpa") if (name, kind) != ("T5", "sdpa")]


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_models_for_language(name, attention):
    *_, loss, tolerance = LANGUAGE_MODELS[name]
    assert_equal(language_model(name, attention).double(), loss, tolerance=tolerance)


class Training(L.LightningModule):
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("name", ["timm vit_tiny", "torchvision mobilenet_v3_small", "BERT"])
def test_the_callback_trains_them(name):
    trained = []
    for method in ("taylor", "autograd"):
        torch.manual_seed(0)
        make, loss = IMAGE_MODELS.get(name) or (lambda: language_model(name, "sdpa"), predicted_with_padding)
        module = Training(make().double(), loss)
        torch.manual_seed(1)
        fit(module, [lh.HessianRegularizer(lh.HessianTrace(method=method), 1e-6)], max_steps=2)
        trained.append(weights(module))
    assert relative_error(*trained) < EXACT
