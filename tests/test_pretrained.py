"""Detectors and embeddings of transformers: tiny random models of the real classes, loaded from a folder. What is tested
is what goes in and comes out, not what the models know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
)

from attnctrl.metrics import Detection, Wanted, measure_layout
from attnctrl.metrics.detections import crop
from attnctrl.metrics.pretrained import ImageEmbedding, OpenVocabularyDetector
from attnctrl.toybox import text

SIDE, PATCH = 32, 8
CELLS = SIDE // PATCH
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING = {**SMALL, "image_size": SIDE, "patch_size": PATCH}
SIZE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def owls(tmp_path_factory) -> dict[str, str]:
    """Folders of OwlViT and Owlv2. Boxes are of one patch each, around its lower right corner."""
    folders = {}
    clip = text.clip_tokenizer()
    reading = {
        **SMALL,
        "vocab_size": len(clip),
        "max_position_embeddings": text.MAX_LENGTH,
        "eos_token_id": clip.eos_token_id,
        "pad_token_id": clip.pad_token_id,
        "bos_token_id": clip.bos_token_id,
    }
    kinds = {
        "owlvit": (OwlViTForObjectDetection, OwlViTConfig, OwlViTImageProcessorPil),
        "owlv2": (Owlv2ForObjectDetection, Owlv2Config, Owlv2ImageProcessorPil),
    }
    for name, (kind, config, processor) in kinds.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(config(text_config=reading, vision_config=SEEING, projection_dim=16))
        with torch.no_grad():
            for part in model.box_head.dense2.parameters():
                part.zero_()
            # scores between 0.1 and 0.9, so that a threshold parts them
            model.class_head.logit_scale.weight.zero_()
            model.class_head.logit_scale.bias.fill_(3.0)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        clip.save_pretrained(folder)
        processor(size=SIZE).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def cell(index: int, width: float, height: float) -> tuple[float, ...]:
    """Pixels of the box of a patch, in whole pixels as the pipeline gives them, as shares of IMAGE."""
    x, y = (index % CELLS + 1) / CELLS, (index // CELLS + 1) / CELLS
    # logits are of numbers that are kept 1e-4 away from 0 and 1
    x, y, half = (_squashed(one) for one in (x, y, 1 / CELLS))
    rows, columns = IMAGE.shape[:2]
    box = [
        int(v)
        for v in ((x - half / 2) * width, (y - half / 2) * height, (x + half / 2) * width, (y + half / 2) * height)
    ]
    return tuple(min(max(v / side, 0), 1) for v, side in zip(box, (columns, rows, columns, rows), strict=True))


def _squashed(value: float) -> float:
    return (value + 1e-4) / (1 + 2e-4)


def expected(detector: OpenVocabularyDetector, label: str) -> np.ndarray:
    """Scores of all patches under a label, from the model itself: [cells]."""
    inputs = detector.pipe.tokenizer(label, return_tensors="pt")
    pixels = detector.pipe.image_processor(Image.fromarray(IMAGE), return_tensors="pt")
    with torch.no_grad():
        return detector.pipe.model(**inputs, **pixels).logits[0, :, 0].sigmoid().numpy()


@pytest.mark.parametrize("name", ["owlvit", "owlv2"])
def test_boxes_are_shares_and_scores_those_of_the_model(owls, name):
    detector = OpenVocabularyDetector.load(owls[name], threshold=0.0)
    labels = ["red circle", "blue star", "red circle"]
    found = detector(IMAGE, labels)
    # Owlv2 pads the picture to a square: the lower half of its patches lies outside
    width, height = (80, 40) if name == "owlvit" else (80, 80)
    inside = [index for index in range(CELLS**2) if name == "owlvit" or index // CELLS < 2]
    for label in ("red circle", "blue star"):
        scores = expected(detector, label)
        mine = [one for one in found if one.label == label]
        assert [one.score for one in mine] == sorted((one.score for one in mine), reverse=True)
        assert len(mine) == len(inside)
        for one, index in zip(mine, sorted(inside, key=lambda index: -scores[index]), strict=True):
            assert one.score == pytest.approx(scores[index], abs=1e-5)
            assert one.box == pytest.approx(cell(index, width, height), abs=1e-6)
            assert one.mask is None
    assert {one.label for one in found} == set(labels)
    assert detector(IMAGE, []) == []


def test_a_threshold_keeps_the_surest(owls):
    everything = OpenVocabularyDetector.load(owls["owlvit"], threshold=0.0)(IMAGE, ["red circle"])
    half = everything[len(everything) // 2].score
    found = OpenVocabularyDetector.load(owls["owlvit"], threshold=half)(IMAGE, ["red circle"])
    assert [one.score for one in found] == [one.score for one in everything if one.score > half]
    assert 0 < len(found) < len(everything)


class Pipe:
    """A pipeline that finds what it is told to."""

    def __init__(self, model_type: str, found: list[dict]) -> None:
        self.model = type("Model", (), {"config": type("Config", (), {"model_type": model_type})})
        self.found, self.asked = found, []

    def __call__(self, image, candidate_labels, threshold):
        self.asked.append((image.size, candidate_labels, threshold))
        return self.found


def box(x0: int, x1: int) -> dict[str, int]:
    return {"xmin": x0, "ymin": -3, "xmax": x1, "ymax": 20}


def test_of_two_boxes_on_one_thing_the_surer_stays():
    answers = [
        {"label": "cat", "score": 0.5, "box": box(0, 40)},
        {"label": "cat", "score": 0.9, "box": box(4, 40)},
        {"label": "dog", "score": 0.2, "box": box(0, 40)},
        {"label": "cat", "score": 0.3, "box": box(36, 100)},
        {"label": "cat", "score": 0.8, "box": box(80, 120)},
    ]
    detector = OpenVocabularyDetector(Pipe("owlv2", answers), threshold=0.25)
    found = detector(IMAGE, ["cat", "dog"])
    assert [(one.label, one.score, one.box) for one in found] == [
        ("cat", 0.9, (0.05, 0, 0.5, 0.5)),
        ("cat", 0.3, (0.45, 0, 1, 0.5)),
        ("dog", 0.2, (0, 0, 0.5, 0.5)),
    ]
    assert detector.pipe.asked == [((80, 40), ["cat", "dog"], 0.25)]
    assert len(OpenVocabularyDetector(Pipe("owlv2", answers), overlap=1.0)(IMAGE, ["cat", "dog"])) == 4


def test_grounding_dino_is_asked_in_sentences():
    pipe = Pipe("grounding-dino", [{"label": "cat.", "score": 0.5, "box": box(0, 40)}])
    (found,) = OpenVocabularyDetector(pipe)(IMAGE, ["cat"])
    assert found.label == "cat"
    assert pipe.asked[0][1] == ["cat."]


def test_grounding_dino_runs(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "circle"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GroundingDinoForObjectDetection(
            GroundingDinoConfig(
                backbone_config={
                    "model_type": "swin", "image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1],
                    "num_heads": [2, 2, 2], "window_size": 4, "out_features": ["stage2", "stage3"],
                },
                text_config={"model_type": "bert", **SMALL, "vocab_size": len(words), "max_position_embeddings": 16},
                d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_feature_levels=2, max_text_len=16,
            )
        )  # fmt: skip
    model.save_pretrained(tmp_path)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
    GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE}).save_pretrained(tmp_path)
    detector = OpenVocabularyDetector(OpenVocabularyDetector.load(str(tmp_path)).pipe, threshold=0.0, overlap=1.0)
    found = detector(IMAGE, ["red circle"])
    inputs = detector.pipe.tokenizer("red circle.", return_tensors="pt")
    pixels = detector.pipe.image_processor(Image.fromarray(IMAGE), return_tensors="pt")
    with torch.no_grad():
        said = detector.pipe.model(**inputs, **pixels)
    best, order = said.logits[0].sigmoid().amax(-1).sort(descending=True)
    assert [one.score for one in found] == pytest.approx(best.tolist(), abs=1e-5)
    for one, (x, y, w, h) in zip(found, said.pred_boxes[0][order].tolist(), strict=True):
        # whole pixels of 80 x 40
        assert one.label == "red circle"
        assert one.box == pytest.approx(np.clip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 0, 1), abs=1 / 40)


@pytest.fixture(scope="module")
def seers(tmp_path_factory) -> dict[str, str]:
    """Folders of CLIP and DINOv2."""
    folders = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "clip": (
                CLIPModel(CLIPConfig(text_config=SMALL, vision_config=SEEING, projection_dim=12)),
                CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE),
            ),
            "dino": (
                Dinov2Model(Dinov2Config(**SMALL, image_size=SIDE, patch_size=PATCH)),
                BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE),
            ),
        }
    for name, (model, processor) in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_an_embedding_is_that_of_the_crop(seers, name):
    embed = ImageEmbedding.load(seers[name])
    found = Detection("cat", (0.25, 0.5, 0.75, 1.0))
    value = embed(IMAGE, found)
    pixels = AutoImageProcessor.from_pretrained(seers[name])(
        images=Image.fromarray(crop(IMAGE, found.box)), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        if name == "clip":
            pooled = embed.model.vision_model(pixels).pooler_output
            want = embed.model.visual_projection(pooled)[0]
        else:
            want = embed.model.layernorm(embed.model.encoder(embed.model.embeddings(pixels)).last_hidden_state)[0, 0]
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, want.double().numpy(), atol=1e-6)
    assert not np.allclose(value, embed(IMAGE, Detection("cat", (0, 0, 1, 1))), atol=1e-3)


def test_a_layout_is_measured_with_them(owls, seers):
    detector = OpenVocabularyDetector.load(owls["owlvit"], threshold=0.0)
    surest = detector(IMAGE, ["red circle"])[0]
    wanted = [Wanted("red circle", surest.box, IMAGE)]
    values = measure_layout(IMAGE, wanted, detector, ImageEmbedding.load(seers["dino"]), IMAGE)
    assert values == pytest.approx(dict.fromkeys(values, 1.0))
    assert list(values) == ["inclusion_ratio", "fill_ratio", "identity_similarity", "background_similarity"]
