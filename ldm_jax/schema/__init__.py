"""Every choice that defines a run, as frozen dataclasses that a file in `configs/` fills in.

Class names end in `Config`. A field is *identity* (model, data, objective, optimizer, batch, seed:
changing it makes another run) unless it was made with `execution(...)` (mesh, total steps,
intervals, workers, remat, attention: may change on resume); the mark covers all below the field.
"""

from ldm_jax.schema.conds import (
    BERTTextConfig,
    ClassCondConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    CondConfig,
    DepthCondConfig,
    EmbeddingCondConfig,
    HybridCondConfig,
    InpaintCondConfig,
    LayoutCondConfig,
    SemanticCondConfig,
    SuperResCondConfig,
    TextCondConfig,
    UpscaleCondConfig,
    text_of,
)
from ldm_jax.schema.data import (
    DataConfig,
    FolderConfig,
    PhotosConfig,
    SourceConfig,
    SyntheticConfig,
    TFDSConfig,
)
from ldm_jax.schema.mark import (
    execution,
)
from ldm_jax.schema.models import (
    AutoencoderKLConfig,
    AutoencoderVQConfig,
    FirstStageModelConfig,
    IdentityFirstStageConfig,
    UNetConfig,
)
from ldm_jax.schema.objectives import (
    DiffusionConfig,
    DiscriminatorConfig,
    EMAConfig,
    FirstStageLossConfig,
    IntervalConfig,
    MeshConfig,
    OptimizerConfig,
    WatchConfig,
)
from ldm_jax.schema.recipes import (
    AutoencoderTrainConfig,
    FirstStageConfig,
    LatentCacheConfig,
    LatentDiffusionConfig,
    LatentDiffusionTrainConfig,
    SamplingConfig,
    SpikeConfig,
    TrainConfig,
)

__all__ = [
    "AutoencoderKLConfig",
    "AutoencoderTrainConfig",
    "AutoencoderVQConfig",
    "BERTTextConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ClassCondConfig",
    "CondConfig",
    "DataConfig",
    "DepthCondConfig",
    "DiffusionConfig",
    "DiscriminatorConfig",
    "EMAConfig",
    "EmbeddingCondConfig",
    "FirstStageConfig",
    "FirstStageLossConfig",
    "FirstStageModelConfig",
    "FolderConfig",
    "HybridCondConfig",
    "IdentityFirstStageConfig",
    "InpaintCondConfig",
    "IntervalConfig",
    "LatentCacheConfig",
    "LatentDiffusionConfig",
    "LatentDiffusionTrainConfig",
    "LayoutCondConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PhotosConfig",
    "SamplingConfig",
    "SemanticCondConfig",
    "SourceConfig",
    "SpikeConfig",
    "SuperResCondConfig",
    "SyntheticConfig",
    "TFDSConfig",
    "TextCondConfig",
    "TrainConfig",
    "UNetConfig",
    "UpscaleCondConfig",
    "WatchConfig",
    "execution",
    "text_of",
]
