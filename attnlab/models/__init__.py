"""Model families and their configs, one module per family."""

from attnlab.models.base import GenerationDefaults, ModelConfig, SourceConfig, TokenFlops, TransformerConfig
from attnlab.models.captioner import Captioner, CaptionerConfig
from attnlab.models.contrastive import Contrastive, ContrastiveConfig
from attnlab.models.decoder import Decoder, DecoderConfig
from attnlab.models.encoder import Encoder, EncoderConfig
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
from attnlab.models.seq2seq import Seq2Seq, Seq2SeqConfig
from attnlab.models.speech import SpeechEncoder, SpeechEncoderConfig
from attnlab.models.text import Learned, Sinusoidal
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
