"""Folders of transformers' own classes with small random weights: detectors that know COCO's classes, a CLIP, and a
vision-language model."""

import tokenizers
import torch
import transformers

from qwen_image_fast.training.evaluation.bench.coco import CLASSES

# As folders converted for transformers have them.
LABELS = [
    {"couch": "sofa", "tv": "tvmonitor", "tv remote": "remote", "airplane": "aeroplane"}.get(c, c) for c in CLASSES
]
SEEN = {"size": {"height": 64, "width": 64}}


def mask2former(folder, name="dog", labels=LABELS):
    """Every query sees an object of one class; where is random."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=32, patch_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()
        model.class_predictor.bias[min(CLASSES.index(name), len(labels) - 1)] = 20.0
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(**SEEN).save_pretrained(folder)
    return folder


def yolos(folder, name="dog"):
    """Every query sees the same class; boxes are random."""
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=3, id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():
        last = model.class_labels_classifier.layers[-1]
        last.weight.zero_()
        last.bias.zero_()
        last.bias[CLASSES.index(name)] = 20.0
    model.save_pretrained(folder)
    transformers.YolosImageProcessor(**SEEN).save_pretrained(folder)
    return folder


def clip(folder):
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "-</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    text = {"vocab_size": len(words), "max_position_embeddings": 40, "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1, **parts}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **parts},
                                     projection_dim=8)  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    shown = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(shown, tokenizer).save_pretrained(folder)
    return folder


def llava(folder):
    """A vision-language model that answers at random, and what prepares its input."""
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", *"abcdefghijklmnopqrstuvwxyz"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    shown = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    each = "{% for m in messages %}{% for p in m['content'] %}"
    template = each + "{% if p['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    transformers.LlavaProcessor(
        shown, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **parts),
        text_config=transformers.LlamaConfig(vocab_size=len(vocabulary), **parts), image_token_index=3,
        vision_feature_layer=-1,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
