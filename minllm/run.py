"""What one training run is: the class that a config file is read into."""

from typing import Any, Literal

from pydantic import Field

from minllm.config import config
from minllm.data import Chat, Data, Mixture, Ramp
from minllm.layer import Precision, Remat
from minllm.lora import LoRA
from minllm.objectives import SFT, NextToken, Objective
from minllm.optim import AdamW, Optimizer, Schedule
from minllm.sample import Sampler


@config
class Model:
    """A family of `minllm.models.FAMILIES`, a preset of it, and arguments of its builder in place of the preset's. Without
    args.vocab the vocabulary is the tokenizer's."""

    family: str = "llama"
    preset: str | None = None
    args: dict[str, int | float | bool | str | None] = Field(default_factory=dict)


@config
class Mesh:
    """Sizes of the mesh axes, outermost first; one may be -1: the rest of the devices."""

    data: int = -1
    fsdp: int = 1
    stage: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


@config
class Checkpoints:
    every: int = Field(default=500, ge=1, description="steps between checkpoints; one more at the end, before evaluations and on SIGTERM")
    keep: int = Field(default=3, ge=1, description="the newest so many are kept")
    best: bool = Field(default=True, description="and the one of the best evaluation")
    save_async: bool = Field(default=True, description="write while training goes on")


@config
class Evaluations:
    every: int = Field(default=500, ge=1, description="steps between evaluations; one more, of the whole held-out split, at the end")
    rows: int | None = Field(default=256, ge=1, description="held-out windows that an evaluation during training looks at; null: all")
    batch: int | None = Field(default=None, ge=1, description="rows a batch; null: the training batch")


@config
class Samples:
    """Texts drawn during training."""

    every: int = Field(default=500, ge=1)
    prompts: tuple[str, ...] = ()
    tokens: int = Field(default=200, ge=1, description="tokens a sample")
    sampler: Sampler = Sampler(temperature=0.8)


@config
class Run:
    out: str = Field(default="runs/default", description="the run folder: checkpoints, metrics, the resolved config, the loss curve")
    steps: int = Field(default=1000, ge=1)
    batch: int | Ramp = Field(default=16, description="rows a step over all devices, or stages of a ramp")
    microbatches: int = Field(default=1, ge=1, description="pieces that a batch is split into to save memory")
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: Model = Model()
    data: Data = Data()
    objective: Objective = NextToken()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    clip: float | None = Field(default=1.0, gt=0, description="largest global norm of the gradient; null: no clipping")
    spike: float | None = Field(default=None, gt=1, description="skip a step whose gradient norm is so many times its moving average")
    average: float | None = Field(default=None, gt=0, lt=1, description="decay of the moving average of the parameters; null: none")
    lora: LoRA | None = Field(default=None, description="train low-rank factors beside frozen weights")
    init_from: str | None = Field(default=None, description="a run folder or checkpoint whose parameters this run starts from")
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    kernels: Literal["auto", "reference", "tpu", "gpu"] = "auto"
    remat: Remat = "none"
    scan: bool | None = Field(default=None, description="scan over stacked layers; null: unroll on CPU, scan elsewhere")
    checkpoints: Checkpoints = Checkpoints()
    evaluations: Evaluations = Evaluations()
    samples: Samples = Samples()
    metrics: tuple[Literal["console", "jsonl", "tensorboard", "wandb"], ...] = ("console", "jsonl", "tensorboard")
    compilation_cache: str | None = Field(default=None, description="folder where compiled programs are kept between runs")

    def __post_init__(self):
        sources = self.data.source.sources if isinstance(self.data.source, Mixture) else (self.data.source,)
        if isinstance(self.objective, SFT) and not any(isinstance(source, Chat) for source in sources):
            raise ValueError("objective sft learns what a chat source marks; data.source has none: use kind: chat, or next_token")

    def ramp(self, history: Any = None) -> Ramp:
        """Batch sizes by step. history: the stages that a resumed run has behind it, ending with the step it resumes at."""
        mine = Ramp.of(self.batch)
        if not history:
            return mine
        step, past = history["step"], Ramp(stages=tuple(map(tuple, history["stages"])))
        if all(past.size_of(s) == mine.size_of(s) for s in {first for first, _ in (*past.stages, *mine.stages)} if s < step):
            return mine
        before = tuple((first, size) for first, size in past.stages if first < step)
        return Ramp(stages=(*before, (step, mine.size_of(step)), *((first, size) for first, size in mine.stages if first > step)))
