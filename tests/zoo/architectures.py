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


SIZES = {
    1: "n_shared_experts num_sparse_encoder_layers num_sparse_decoder_layers moe_num_shared_experts topk_group",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "encoder_num_hidden_layers decoder_num_hidden_layers num_key_value_heads num_experts_per_tok moe_k n_group "
    "linear_num_key_heads num_self_attends_per_block encoder_sparse_step decoder_sparse_step",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "encoder_num_attention_heads decoder_num_attention_heads encoder_num_key_value_heads decoder_num_key_value_heads "
    "num_self_attention_heads num_cross_attention_heads linear_num_value_heads mamba_n_heads n_mamba_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim sliding_window attention_window_size "
    "local_attention mamba_chunk_size num_detection_tokens cls_token_id",
    8: "d_kv head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "query_pre_attn_scalar mamba_d_state mamba_dt_rank adapter_rank num_latents position_buckets expert_capacity "
    "attention_chunk_size patch_size num_conv_pos_embeddings encoder_max_relative_position num_filters",
    32: "hidden_size d_model n_embd dim d_latents embedding_size word_embed_proj_dim attention_hidden_size lru_width "
    "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size qk_channels v_channels "
    "image_size decoder_hidden_size projection_dim max_source_positions flow_size upsample_initial_channel "
    "duration_predictor_filter_channels block_multiple_of",
    64: "max_position_embeddings n_positions max_seq_len context_length max_target_positions intermediate_size_mlp "
    "max_encoder_position_embeddings max_decoder_position_embeddings max_speech_positions max_text_positions "
    "codebook_size",
    96: "intermediate_size ffn_dim hidden_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim",
    VOCABULARY: "vocab_size decoder_vocab_size",
}
"""The fields of configurations that have a small value in every model that does not give another one."""

SMALL = {field: size for size, fields in SIZES.items() for field in fields.split()}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def small(config: type) -> dict[str, Any]:
    """Return the small values of the fields that a class of configurations has."""
    known = vars(config())
    return {field: value for field, value in SMALL.items() if field in known}


def part(kind: str, **more: Any) -> dict[str, Any]:
    """Return the configuration of a part of a model, by its ``model_type``."""
    return {"model_type": kind} | small(transformers.CONFIG_MAPPING[kind]) | more


def pretrained(
    name: str,
    kind: str,
    inputs: Callable[[], Inputs],
    generates: bool = False,
    lacks: tuple[str, ...] = (),
    **config: Any,
) -> Architecture:
    """Return an architecture of transformers.

    Args:
        kind: the name of the model's class.
        config: fields of its configuration; those that ``SIZES`` names are small unless they are given here.
    """

    def build() -> nn.Module:
        cls = getattr(transformers, kind)
        return cls(cls.config_class(**small(cls.config_class) | config))

    return Architecture(name, partial(seeded, name, build), inputs, generates, lacks)


PYRAMID = {"depths": [1, 1], "hidden_sizes": [32, 64]}
BACKBONE = {"model_type": "resnet", "embedding_size": 32, "layer_type": "basic", "out_features": ["stage2"]} | PYRAMID
DETECTION = {"use_timm_backbone": False, "backbone_config": BACKBONE, "num_queries": 5}
SPEECH = {
    "conv_dim": (32, 32),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
IMAGE_TOKEN = 3


def text_with_image() -> Inputs:
    return text() | image()


def image_in_text() -> Inputs:
    """Return text in which each of an image's 16 patches has its token."""
    inputs = text_with_image()
    inputs["input_ids"] = torch.cat([torch.full((2, 16), IMAGE_TOKEN), inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def speech(*shape: int, **more: Tensor) -> Callable[[], Inputs]:
    return lambda: {"input_values": draw(*shape), **more}


causal = partial(pretrained, inputs=text, generates=True)
masked = partial(pretrained, inputs=text)
translation = partial(pretrained, inputs=texts, generates=True)
vision = partial(pretrained, inputs=image)
captions = partial(pretrained, inputs=image_in_text, generates=True, image_token_index=IMAGE_TOKEN)
LATENT = {"num_key_value_heads": 4, "first_k_dense_replace": 1, "norm_topk_prob": True}  # low-rank attention

TRANSFORMERS = (
    # Decoders.
    causal("gpt2", "GPT2LMHeadModel"),
    causal("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    causal("gpt_neox", "GPTNeoXForCausalLM"),
    causal("gptj", "GPTJForCausalLM"),
    causal("codegen", "CodeGenForCausalLM"),
    causal("gpt_bigcode", "GPTBigCodeForCausalLM"),
    causal("falcon", "FalconForCausalLM"),
    causal("opt", "OPTForCausalLM"),
    causal("bloom", "BloomForCausalLM"),
    causal("mpt", "MptForCausalLM"),
    causal("llama", "LlamaForCausalLM"),
    causal("mistral", "MistralForCausalLM"),
    causal("qwen2", "Qwen2ForCausalLM"),
    causal("qwen3", "Qwen3ForCausalLM"),
    causal("gemma", "GemmaForCausalLM"),
    causal("gemma2", "Gemma2ForCausalLM"),
    causal("gemma3", "Gemma3ForCausalLM"),
    causal("phi", "PhiForCausalLM"),
    causal("phi3", "Phi3ForCausalLM"),
    causal("stablelm", "StableLmForCausalLM"),
    causal("olmo", "OlmoForCausalLM"),
    causal("olmo2", "Olmo2ForCausalLM"),
    causal("cohere", "CohereForCausalLM"),
    causal("starcoder2", "Starcoder2ForCausalLM"),
    causal("granite", "GraniteForCausalLM"),
    causal("nemotron", "NemotronForCausalLM"),
    causal("smollm3", "SmolLM3ForCausalLM"),
    causal("xlnet", "XLNetLMHeadModel"),
    # Recurrent ones, and those that mix recurrence with attention.
    # RWKV would otherwise divide its own weights in inference, and write its cache in place, which stops backward.
    causal("rwkv", "RwkvForCausalLM", rescale_every=0, use_cache=False),
    causal("mamba", "MambaForCausalLM", state_size=8),
    causal("mamba2", "Mamba2ForCausalLM", state_size=8, head_dim=16, n_groups=2, chunk_size=4),
    causal("falcon_mamba", "FalconMambaForCausalLM", state_size=8),
    causal(
        "jamba",
        "JambaForCausalLM",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    causal("bamba", "BambaForCausalLM", attn_layer_indices=[1], mamba_d_head=16, mamba_n_groups=2),
    causal("recurrent_gemma", "RecurrentGemmaForCausalLM", num_hidden_layers=3),
    causal("qwen3_next", "Qwen3NextForCausalLM", layer_types=["linear_attention", "full_attention"]),
    causal("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    causal(
        "zamba2",
        "Zamba2ForCausalLM",
        layers_block_type=["linear_attention", "hybrid"],
        mamba_ngroups=2,
        chunk_size=4,
        use_mamba_kernels=False,
        attention_hidden_size=64,
    ),
    # Mixtures of experts.
    causal("mixtral", "MixtralForCausalLM"),
    causal("olmoe", "OlmoeForCausalLM"),
    causal("qwen2_moe", "Qwen2MoeForCausalLM"),
    causal("qwen3_moe", "Qwen3MoeForCausalLM"),
    causal("granitemoe", "GraniteMoeForCausalLM"),
    causal("phimoe", "PhimoeForCausalLM"),
    causal("gpt_oss", "GptOssForCausalLM"),
    causal("deepseek_v2", "DeepseekV2ForCausalLM", **LATENT),
    causal("deepseek_v3", "DeepseekV3ForCausalLM", **LATENT),
    causal("glm4_moe", "Glm4MoeForCausalLM"),
    causal("ernie_moe", "Ernie4_5_MoeForCausalLM", moe_layer_start_index=1),
    causal("llama4", "Llama4ForCausalLM", interleave_moe_layer_step=2, no_rope_layers=[1, 0]),
    # Encoders.
    masked("bert", "BertForMaskedLM"),
    masked("roberta", "RobertaForMaskedLM", type_vocab_size=1),
    masked("distilbert", "DistilBertForMaskedLM"),
    masked("albert", "AlbertForMaskedLM"),
    masked("electra", "ElectraForPreTraining"),
    masked("mpnet", "MPNetForMaskedLM"),
    masked("modernbert", "ModernBertForMaskedLM", sep_token_id=4),
    masked("deberta_v2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    masked("longformer", "LongformerForMaskedLM", attention_window=[4, 4]),
    pretrained(
        "perceiver",
        "PerceiverForMaskedLM",
        inputs=lambda: {"inputs": tokens(length=16)},
        max_position_embeddings=16,
    ),
    masked("esm", "EsmForMaskedLM", position_embedding_type="rotary", mask_token_id=5),
    masked("fnet", "FNetForMaskedLM", lacks=("bfloat16",)),
    # Encoders with decoders.
    translation("t5", "T5ForConditionalGeneration", decoder_start_token_id=0),
    translation("mt5", "MT5ForConditionalGeneration", decoder_start_token_id=0),
    translation("switch", "SwitchTransformersForConditionalGeneration", decoder_start_token_id=0, expert_capacity=32),
    translation("nllb_moe", "NllbMoeForConditionalGeneration"),
    translation("bart", "BartForConditionalGeneration"),
    translation("mbart", "MBartForConditionalGeneration", decoder_start_token_id=2),
    translation("pegasus", "PegasusForConditionalGeneration"),
    translation("marian", "MarianMTModel", decoder_start_token_id=2),
    translation("led", "LEDForConditionalGeneration", attention_window=[4, 4]),
    # Images.
    vision("vit", "ViTForImageClassification"),
    vision("dinov2", "Dinov2Model"),
    vision("beit", "BeitForImageClassification", use_relative_position_bias=True),
    vision(
        "swin",
        "SwinForImageClassification",
        patch_size=4,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    vision("convnext", "ConvNextForImageClassification", **PYRAMID, num_stages=2, patch_size=4),
    vision("convnextv2", "ConvNextV2ForImageClassification", **PYRAMID, num_stages=2, patch_size=4),
    vision(
        "efficientnet",
        "EfficientNetForImageClassification",
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
        patch_size=2,
        hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[16, 16, 24, 24, 32, 32, 64],
        expand_ratio=2.0,
    ),
    vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        **PYRAMID,
        num_encoder_blocks=2,
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    vision("detr", "DetrForObjectDetection", **DETECTION),
    vision("conditional_detr", "ConditionalDetrForObjectDetection", **DETECTION),
    vision("yolos", "YolosForObjectDetection", image_size=[32, 32]),
    pretrained(
        "sam",
        "SamModel",
        inputs=lambda: image() | {"input_points": draw(2, 1, 2, 2).abs() * 16},
        vision_config=part(
            "sam_vision_model", output_channels=32, num_pos_feats=16, window_size=2, global_attn_indexes=[1]
        ),
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 96, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    ),
    # Images with text.
    pretrained(
        "clip",
        "CLIPModel",
        inputs=text_with_image,
        text_config=part("clip_text_model"),
        vision_config=part("clip_vision_model"),
    ),
    pretrained(
        "siglip",
        "SiglipModel",
        inputs=text_with_image,
        text_config=part("siglip_text_model"),
        vision_config=part("siglip_vision_model"),
    ),
    pretrained(
        "blip",
        "BlipForImageTextRetrieval",
        inputs=text_with_image,
        text_config=part("blip_text_model"),
        vision_config=part("blip_vision_model"),
        lacks=("checkpointing",),
    ),
    captions(
        "llava",
        "LlavaForConditionalGeneration",
        text_config=part("llama"),
        vision_config=part("clip_vision_model"),
    ),
    captions(
        "blip2",
        "Blip2ForConditionalGeneration",
        text_config=part("opt"),
        vision_config=part("blip_2_vision_model"),
        qformer_config=part("blip_2_qformer", encoder_hidden_size=32),
        num_query_tokens=16,
    ),
    captions(
        "gemma3_vision",
        "Gemma3ForConditionalGeneration",
        inputs=lambda: image_in_text() | {"token_type_ids": image_in_text()["input_ids"].eq(IMAGE_TOKEN).long()},
        text_config=part("gemma3_text"),
        vision_config=part("siglip_vision_model"),
        mm_tokens_per_image=16,
    ),
    # Speech.
    pretrained(
        "whisper",
        "WhisperForConditionalGeneration",
        inputs=lambda: {"input_features": draw(2, 16, 64), "decoder_input_ids": tokens(length=5)},
        num_mel_bins=16,
        begin_suppress_tokens=None,
        decoder_start_token_id=2,
        generates=True,
    ),
    pretrained("wav2vec2", "Wav2Vec2ForCTC", speech(2, 400), lacks=("pickle",), **SPEECH),
    pretrained(
        "moonshine",
        "MoonshineForConditionalGeneration",
        speech(2, 2000, decoder_input_ids=tokens(length=5)),
        generates=True,
    ),
    pretrained(
        "speecht5",
        "SpeechT5ForSpeechToText",
        speech(2, 400, decoder_input_ids=tokens(length=5)),
        decoder_start_token_id=2,
        generates=True,
        lacks=("pickle",),
        **SPEECH,
    ),
    pretrained("hubert", "HubertForCTC", speech(2, 400), lacks=("pickle",), **SPEECH),
    pretrained(
        "vits",
        "VitsModel",
        inputs=text,
        spectrogram_bins=33,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
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
        speech(2, 1, 320),
        upsampling_ratios=[4, 4],
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
