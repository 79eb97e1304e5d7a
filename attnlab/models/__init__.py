"""Model families and their configs, one module per family."""

from attnlab.layers.specs import Learned, Sinusoidal
from attnlab.models.captioner import Captioner, CaptionerConfig
from attnlab.models.config import ModelConfig, SourceConfig, TransformerConfig
from attnlab.models.contrastive import Contrastive, ContrastiveConfig
from attnlab.models.decoder import Decoder, DecoderConfig
from attnlab.models.encoder import Encoder, EncoderConfig
from attnlab.models.flops import TokenFlops
from attnlab.models.generation_defaults import GenerationDefaults
from attnlab.models.heads import (
    ClassifierConfig,
    DenseConfig,
    FirstToken,
    MaskedLMConfig,
    MeanOfTokens,
    PooledConfig,
)
from attnlab.models.recurrent import Recurrent, RecurrentConfig
from attnlab.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from attnlab.models.resampler import Resampler, ResamplerConfig
from attnlab.models.seq2seq import Seq2Seq, Seq2SeqConfig
from attnlab.models.speech import SpeechEncoder, SpeechEncoderConfig
from attnlab.models.vision_language import ProjectorConfig, VisionLanguageConfig, VisionLanguageModel
from attnlab.models.vit import ViT, ViTConfig

__all__ = [
    "Captioner",
    "CaptionerConfig",
    "ClassifierConfig",
    "Contrastive",
    "ContrastiveConfig",
    "Decoder",
    "DecoderConfig",
    "DenseConfig",
    "Encoder",
    "EncoderConfig",
    "FirstToken",
    "GenerationDefaults",
    "Learned",
    "MaskedLMConfig",
    "MeanOfTokens",
    "ModelConfig",
    "PooledConfig",
    "ProjectorConfig",
    "Recurrent",
    "RecurrentConfig",
    "RecurrentSeq2Seq",
    "RecurrentSeq2SeqConfig",
    "Resampler",
    "ResamplerConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Sinusoidal",
    "SourceConfig",
    "SpeechEncoder",
    "SpeechEncoderConfig",
    "TokenFlops",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "VisionLanguageConfig",
    "VisionLanguageModel",
]
