"""Tiny models of real architectures, with random weights: for tests that convert what people run.

Each is built from a configuration, in eval mode and seeded by its name. Rows of weights are 32 to 96 numbers long, so
that some are shorter than a block of 64, and some end in a short block.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.vgg import make_layers

VOCABULARY = 128
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model that can be made again and again, each time with the same weights.

    Attributes:
        make: returns a new model, in eval mode.
        inputs: returns the keyword arguments of an example call.
        generates: whether ``model.generate`` continues tokens.
        lacks: "pickle", "bfloat16" or "checkpointing" with frozen embeddings, which the dense model does not take, or
            "linear" layers, which adapters need.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    generates: bool = False
    lacks: tuple[str, ...] = ()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Return tokens of the vocabulary without its first ten, which are special ones: (batch, length)."""
    return torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(**more: int) -> Inputs:
    return {"input_ids": tokens(**more), "attention_mask": torch.ones_like(tokens(**more))}


def texts() -> Inputs:
    return text() | {"decoder_input_ids": tokens(length=5, seed=1)}


def image(batch: int = 2, size: int = 32) -> Inputs:
    return {"pixel_values": draw(batch, 3, size, size)}


def randomize(model: nn.Module) -> None:
    """Draw all weights anew, so that each of them matters to the output.

    Many classes draw weights of deviation 0.02 and biases of zero: what a layer of 32 such weights adds to a residual
    is lost in it. Drawn with the deviation ``sqrt(2 / inputs)`` (He et al., arXiv 1502.01852), it is as large.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                convolves = isinstance(module, nn.modules.conv._ConvNd)
                parameter.normal_(0, (2 / (parameter[0].numel() if convolves else parameter.shape[-1])) ** 0.5)


def seeded(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(zlib.crc32(name.encode()))
        model = build().eval()
        randomize(model)
    return model


def module(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs], **more: Any) -> Architecture:
    return Architecture(name, partial(seeded, name, build), inputs, **more)


def pretrained(
    name: str,
    kind: str,
    *configs: dict[str, Any],
    inputs: Callable[[], Inputs],
    generates: bool = False,
    lacks: tuple[str, ...] = (),
    **more: Any,
) -> Architecture:
    """Return an architecture of transformers.

    Args:
        kind: the name of the model's class.
        configs: arguments of its configuration, from left to right, then ``more``.
    """

    def build() -> nn.Module:
        cls = getattr(transformers, kind)
        merged: dict[str, Any] = {}
        for config in (*configs, more):
            merged |= config
        return cls(cls.config_class(**merged))

    return Architecture(name, partial(seeded, name, build), inputs, generates, lacks)


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BODY = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SPECIAL | BODY | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
LLAMA = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GPT = SPECIAL | {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
T5 = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LATENT = {  # attention through projections of low rank
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
}
VISION = BODY | {"image_size": 32, "patch_size": 8}
PYRAMID = {"depths": [1, 1], "hidden_sizes": [32, 64]}
SPEECH = BODY | {
    "vocab_size": 32,
    "conv_dim": (32, 32),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}

BACKBONE = {"model_type": "resnet", "embedding_size": 32, "layer_type": "basic", "out_features": ["stage2"]} | PYRAMID
DETECTION = {"use_timm_backbone": False, "backbone_config": BACKBONE, "num_queries": 5}
PAIR = {"text_config": TEXT, "vision_config": VISION}
IMAGE_TOKEN = 3


def text_with_image() -> Inputs:
    return text() | image()


def image_in_text() -> Inputs:
    """Return text in which each of an image's 16 patches has its token."""
    inputs = text_with_image()
    inputs["input_ids"] = torch.cat([torch.full((2, 16), IMAGE_TOKEN), inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


causal = partial(pretrained, inputs=text, generates=True)
masked = partial(pretrained, inputs=text)
translation = partial(pretrained, inputs=texts, generates=True)
vision = partial(pretrained, inputs=image)

TRANSFORMERS = (
    # Decoders.
    causal("gpt2", "GPT2LMHeadModel", GPT),
    causal(
        "gpt_neo", "GPTNeoForCausalLM", TEXT, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    causal("gpt_neox", "GPTNeoXForCausalLM", TEXT),
    causal("gptj", "GPTJForCausalLM", GPT, rotary_dim=4),
    causal("codegen", "CodeGenForCausalLM", GPT, rotary_dim=4),
    causal("gpt_bigcode", "GPTBigCodeForCausalLM", GPT),
    causal("falcon", "FalconForCausalLM", TEXT),
    causal("opt", "OPTForCausalLM", TEXT, ffn_dim=96, word_embed_proj_dim=32),
    causal("bloom", "BloomForCausalLM", TEXT, n_layer=2, n_head=4),
    causal("mpt", "MptForCausalLM", TEXT, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    causal("llama", "LlamaForCausalLM", LLAMA),
    causal("mistral", "MistralForCausalLM", LLAMA, sliding_window=4),
    causal("qwen2", "Qwen2ForCausalLM", LLAMA),
    causal("qwen3", "Qwen3ForCausalLM", LLAMA),
    causal("gemma", "GemmaForCausalLM", LLAMA),
    causal("gemma2", "Gemma2ForCausalLM", LLAMA, query_pre_attn_scalar=8, sliding_window=4),
    causal("gemma3", "Gemma3ForCausalLM", LLAMA, query_pre_attn_scalar=8, sliding_window=4),
    causal("phi", "PhiForCausalLM", TEXT),
    causal("phi3", "Phi3ForCausalLM", TEXT),
    causal("stablelm", "StableLmForCausalLM", TEXT, num_key_value_heads=4),
    causal("olmo", "OlmoForCausalLM", TEXT),
    causal("olmo2", "Olmo2ForCausalLM", TEXT),
    causal("cohere", "CohereForCausalLM", LLAMA),
    causal("starcoder2", "Starcoder2ForCausalLM", LLAMA),
    causal("granite", "GraniteForCausalLM", LLAMA),
    causal("smollm3", "SmolLM3ForCausalLM", LLAMA),
    causal("xlnet", "XLNetLMHeadModel", SPECIAL, vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=96),
    # Recurrent ones, and those that mix recurrence with attention.
    # RWKV would otherwise divide its own weights in inference, and write its cache in place, which stops backward.
    causal(
        "rwkv", "RwkvForCausalLM", TEXT, attention_hidden_size=32, context_length=64, rescale_every=0, use_cache=False
    ),
    causal("mamba", "MambaForCausalLM", TEXT, state_size=8),
    causal("mamba2", "Mamba2ForCausalLM", TEXT, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=4),
    causal("falcon_mamba", "FalconMambaForCausalLM", TEXT, state_size=8),
    causal(
        "jamba",
        "JambaForCausalLM",
        LLAMA,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    causal(
        "bamba",
        "BambaForCausalLM",
        LLAMA,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    causal(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        LLAMA,
        lru_width=32,
        attention_window_size=4,
        num_hidden_layers=3,
    ),
    causal(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        LLAMA,
        EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    causal("lfm2", "Lfm2ForCausalLM", LLAMA, layer_types=["conv", "full_attention"], block_multiple_of=32),
    causal(
        "zamba2",
        "Zamba2ForCausalLM",
        LLAMA,
        layers_block_type=["linear_attention", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=4,
        chunk_size=4,
        use_mamba_kernels=False,
        adapter_rank=8,
    ),
    # Mixtures of experts.
    causal("mixtral", "MixtralForCausalLM", LLAMA, num_local_experts=4),
    causal("olmoe", "OlmoeForCausalLM", LLAMA, num_experts=4, num_experts_per_tok=2),
    causal("qwen2_moe", "Qwen2MoeForCausalLM", LLAMA, EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    causal("qwen3_moe", "Qwen3MoeForCausalLM", LLAMA, EXPERTS, num_experts=4),
    causal("granitemoe", "GraniteMoeForCausalLM", LLAMA, num_local_experts=4),
    causal("phimoe", "PhimoeForCausalLM", LLAMA, num_local_experts=4),
    causal("gpt_oss", "GptOssForCausalLM", LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    causal("deepseek_v2", "DeepseekV2ForCausalLM", TEXT, EXPERTS, LATENT),
    causal("deepseek_v3", "DeepseekV3ForCausalLM", TEXT, EXPERTS, LATENT),
    causal("glm4_moe", "Glm4MoeForCausalLM", LLAMA, EXPERTS, n_routed_experts=4, n_shared_experts=1),
    causal(
        "ernie_moe",
        "Ernie4_5_MoeForCausalLM",
        LLAMA,
        EXPERTS,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    causal(
        "llama4",
        "Llama4ForCausalLM",
        LLAMA,
        intermediate_size_mlp=64,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=8,
    ),
    # Encoders.
    masked("bert", "BertForMaskedLM", TEXT),
    masked("roberta", "RobertaForMaskedLM", TEXT, type_vocab_size=1),
    masked("distilbert", "DistilBertForMaskedLM", TEXT, dim=32, hidden_dim=96, n_layers=2, n_heads=4),
    masked("albert", "AlbertForMaskedLM", TEXT, embedding_size=32),
    masked("electra", "ElectraForPreTraining", TEXT, embedding_size=32),
    masked("mpnet", "MPNetForMaskedLM", TEXT),
    masked("modernbert", "ModernBertForMaskedLM", TEXT, cls_token_id=3, sep_token_id=4, local_attention=4),
    masked(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    masked("longformer", "LongformerForMaskedLM", TEXT, attention_window=[4, 4]),
    pretrained(
        "perceiver",
        "PerceiverForMaskedLM",
        inputs=lambda: {"inputs": tokens(length=16)},
        vocab_size=VOCABULARY,
        num_latents=8,
        d_latents=32,
        d_model=32,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
        max_position_embeddings=16,
    ),
    masked("esm", "EsmForMaskedLM", TEXT, position_embedding_type="rotary", mask_token_id=5),
    masked("fnet", "FNetForMaskedLM", TEXT, lacks=("bfloat16",)),
    # Encoders with decoders.
    translation("t5", "T5ForConditionalGeneration", T5),
    translation("mt5", "MT5ForConditionalGeneration", T5),
    translation(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        T5,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=32,
    ),
    translation(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        BART,
        num_experts=4,
        expert_capacity=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    translation("bart", "BartForConditionalGeneration", BART),
    translation("mbart", "MBartForConditionalGeneration", BART),
    translation("pegasus", "PegasusForConditionalGeneration", BART),
    translation("marian", "MarianMTModel", BART, decoder_vocab_size=VOCABULARY),
    translation(
        "led",
        "LEDForConditionalGeneration",
        BART,
        attention_window=[4, 4],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    # Images.
    vision("vit", "ViTForImageClassification", VISION),
    vision("dinov2", "Dinov2Model", VISION),
    vision("beit", "BeitForImageClassification", VISION, use_relative_position_bias=True),
    vision(
        "swin",
        "SwinForImageClassification",
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    vision("convnext", "ConvNextForImageClassification", PYRAMID, num_stages=2),
    vision("convnextv2", "ConvNextV2ForImageClassification", PYRAMID, num_stages=2),
    vision(
        "efficientnet",
        "EfficientNetForImageClassification",
        image_size=32,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 32],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 4],
        hidden_dim=1280,
    ),
    vision(
        "mobilevit",
        "MobileViTForImageClassification",
        image_size=32,
        patch_size=2,
        hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[16, 16, 24, 24, 32, 32, 64],
        num_attention_heads=4,
        expand_ratio=2.0,
    ),
    vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        PYRAMID,
        num_encoder_blocks=2,
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    vision("detr", "DetrForObjectDetection", BART, DETECTION),
    vision("conditional_detr", "ConditionalDetrForObjectDetection", BART, DETECTION),
    vision("yolos", "YolosForObjectDetection", VISION, image_size=[32, 32], num_detection_tokens=4),
    pretrained(
        "sam",
        "SamModel",
        inputs=lambda: image() | {"input_points": draw(2, 1, 2, 2).abs() * 16},
        vision_config=VISION
        | {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 96, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    ),
    # Images with text.
    pretrained("clip", "CLIPModel", PAIR, inputs=text_with_image, projection_dim=32),
    pretrained("siglip", "SiglipModel", PAIR, inputs=text_with_image),
    pretrained(
        "blip",
        "BlipForImageTextRetrieval",
        PAIR,
        inputs=text_with_image,
        projection_dim=32,
        lacks=("checkpointing",),
    ),
    pretrained(
        "llava",
        "LlavaForConditionalGeneration",
        inputs=image_in_text,
        text_config=LLAMA | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
        generates=True,
    ),
    pretrained(
        "blip2",
        "Blip2ForConditionalGeneration",
        inputs=image_in_text,
        text_config=TEXT | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32},
        vision_config=VISION,
        qformer_config=TEXT | {"encoder_hidden_size": 32},
        num_query_tokens=16,
        image_token_index=IMAGE_TOKEN,
        generates=True,
    ),
    pretrained(
        "gemma3_vision",
        "Gemma3ForConditionalGeneration",
        inputs=lambda: image_in_text() | {"token_type_ids": image_in_text()["input_ids"].eq(IMAGE_TOKEN).long()},
        text_config=LLAMA | {"query_pre_attn_scalar": 8, "sliding_window": 4},
        vision_config=VISION,
        mm_tokens_per_image=16,
        image_token_index=IMAGE_TOKEN,
        generates=True,
    ),
    # Speech.
    pretrained(
        "whisper",
        "WhisperForConditionalGeneration",
        BART,
        inputs=lambda: {"input_features": draw(2, 16, 64), "decoder_input_ids": tokens(length=5)},
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=64,
        begin_suppress_tokens=None,
        generates=True,
    ),
    pretrained(
        "wav2vec2", "Wav2Vec2ForCTC", SPEECH, inputs=lambda: {"input_values": draw(2, 400)}, lacks=("pickle",)
    ),
    pretrained(
        "moonshine",
        "MoonshineForConditionalGeneration",
        SPECIAL,
        inputs=lambda: {"input_values": draw(2, 2000), "decoder_input_ids": tokens(length=5)},
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        max_position_embeddings=64,
        **{
            f"{part}_{what}": count
            for part in ("encoder", "decoder")
            for what, count in {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}.items()
        },
        generates=True,
    ),
    pretrained(
        "speecht5",
        "SpeechT5ForSpeechToText",
        {name: value for name, value in SPEECH.items() if name not in BODY and name != "vocab_size"},
        {name: value for name, value in BART.items() if name not in ("d_model", "max_position_embeddings")},
        inputs=lambda: {"input_values": draw(2, 400), "decoder_input_ids": tokens(length=5)},
        hidden_size=32,
        max_speech_positions=64,
        max_text_positions=64,
        encoder_max_relative_position=8,
        generates=True,
        lacks=("pickle",),
    ),
    pretrained("hubert", "HubertForCTC", SPEECH, inputs=lambda: {"input_values": draw(2, 400)}, lacks=("pickle",)),
    pretrained(
        "vits",
        "VitsModel",
        TEXT,
        inputs=text,
        ffn_dim=96,
        flow_size=32,
        spectrogram_bins=33,
        upsample_initial_channel=32,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        duration_predictor_filter_channels=32,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        use_stochastic_duration_prediction=False,
        noise_scale=0.0,
        lacks=("pickle",),
    ),
    pretrained(
        "encodec",
        "EncodecModel",
        inputs=lambda: {"input_values": draw(2, 1, 320)},
        num_filters=8,
        hidden_size=32,
        upsampling_ratios=[4, 4],
        codebook_size=64,
        target_bandwidths=[24.0],
        lacks=("pickle", "linear"),
    ),
)


def resnet() -> nn.Module:
    """Return a ResNet that ends after its second stage, of 128 channels."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 10)
    return model


def lraspp() -> nn.Module:
    stages = torchvision.models._utils.IntermediateLayerGetter(resnet(), {"layer1": "low", "layer2": "high"})
    return segmentation.LRASPP(stages, 64, 128, num_classes=5, inter_channels=32)


def vgg() -> nn.Module:
    """Return VGG with two layers, and a classifier for what these make of small images."""
    with torch.device("meta"):  # its own classifier has 120 million weights
        model = torchvision.models.VGG(make_layers([32, "M", 64, "M"]))
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 10))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # `randomize` draws them
    return model


def regnet() -> nn.Module:
    stages = BlockParams.from_init_params(depth=2, w_0=32, w_a=32.0, w_m=2.0, group_width=16, se_ratio=0.25)
    return torchvision.models.RegNet(stages, num_classes=10)


def faster_rcnn() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 32, 3, 4, padding=1), nn.ReLU())
    body.out_channels = 32
    return detection.FasterRCNN(
        body,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((8, 16),), ((1.0,),)),
        rpn_pre_nms_top_n_test=20,
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 2, 1),
        box_head=TwoMLPHead(32 * 4, 32),
        box_predictor=FastRCNNPredictor(32, 5),
        box_score_thresh=0.01,
    )


def picture() -> Inputs:
    return {"x": image()["pixel_values"]}


TORCHVISION = (
    module("tv_resnet", resnet, picture),
    module("tv_mobilenet_v2", lambda: torchvision.models.MobileNetV2(10, width_mult=0.25), picture),
    module(
        "tv_mobilenet_v3", lambda: torchvision.models.mobilenet_v3_small(width_mult=0.25, num_classes=10), picture
    ),
    module(
        "tv_efficientnet",
        lambda: torchvision.models.EfficientNet(
            [FusedMBConvConfig(2, 3, 1, 16, 16, 1), MBConvConfig(4, 3, 2, 16, 32, 1)], 0.0, num_classes=10
        ),
        picture,
    ),
    module(
        "tv_swin",
        lambda: torchvision.models.SwinTransformer([4, 4], 32, [1, 1], [2, 4], [4, 4], num_classes=10),
        picture,
    ),
    module("tv_vit", lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 96, num_classes=10), picture),
    module("tv_vgg", vgg, picture),
    module("tv_densenet", lambda: torchvision.models.DenseNet(16, (2, 2), 32, num_classes=10), picture),
    module("tv_regnet", regnet, picture),
    module("tv_lraspp", lraspp, lambda: {"input": image()["pixel_values"]}, lacks=("linear",)),
    module("tv_faster_rcnn", faster_rcnn, lambda: {"images": list(image()["pixel_values"])}, lacks=("bfloat16",)),
)

ARCHITECTURES = {architecture.name: architecture for architecture in (*TRANSFORMERS, *TORCHVISION)}
