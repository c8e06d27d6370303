"""What one training run is: the class that a config file is read into."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minllm.config import ConfigError, Loaded, config, load
from minllm.data import Chat, Data, Mixture, Ramp
from minllm.layer import ContextKind, Named, Pipeline, Precision, Remat, Zero
from minllm.lora import LoRA
from minllm.objectives import SFT, NextToken, Objective
from minllm.optim import AdamW, Optimizer, Schedule
from minllm.sample import Sampler


@config
class Model:
    """A family of `minllm.models.FAMILIES`, a preset of it, and arguments of its builder in place of the preset's. Without
    args.vocab the vocabulary is the tokenizer's. Or the model of a folder."""

    family: str = "llama"
    preset: str | None = None
    args: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    like: str | None = Field(default=None, description="a Hugging Face or run folder whose model this is, in place of a family")

    def __post_init__(self):
        if self.like is not None and (self.preset is not None or self.args):
            raise ValueError(f"model.like takes the model of {self.like} as it is; leave out model.preset and model.args")


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
    folder: str | None = Field(default=None, description="where they go if not into the run folder, such as gs://bucket/name")


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
    init_from: str | None = Field(default=None, description="a run, a checkpoint or a Hugging Face folder: where the parameters come from")
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    pipeline: Pipeline = Pipeline()
    kernels: Literal["auto", "reference", "tpu", "gpu"] = "auto"
    remat: Remat = "none"
    save: tuple[Named, ...] = Field(default=(), description="what remat full or layer keeps: input, qkv, attention, mlp")
    offload: tuple[Named, ...] = Field(default=(), description="what remat full or layer keeps in the host's memory")
    context: ContextKind = Field(default="gather", description="how attention works over mesh.context: all-gather, ring, or all-to-all")
    balance: bool = Field(default=False, description="give each device of mesh.context an early and a late piece of every row")
    zero: Zero = Field(default=3, description="mesh.fsdp shards optimizer state (1), and gradients (2), and weights (3)")
    scan: bool | None = Field(default=None, description="scan over stacked layers; null: unroll on CPU, scan elsewhere")
    checkpoints: Checkpoints = Checkpoints()
    evaluations: Evaluations = Evaluations()
    samples: Samples = Samples()
    metrics: tuple[Literal["console", "jsonl", "tensorboard", "wandb"], ...] = ("console", "jsonl", "tensorboard")
    watchdog: float | None = Field(default=900.0, gt=0, description="seconds without progress after which stacks are written; null: never")
    compilation_cache: str | None = Field(default=None, description="folder where compiled programs are kept between runs")
    topologies: dict[str, dict[str, int | float | bool | str | None]] = Field(
        default_factory=dict, description="settings by machine, as key.sub: value; `--topology NAME` lays them over the others"
    )

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


def for_topology(path: str | Path | None, name: str | None, overrides: Sequence[str] = ()) -> Loaded[Run]:
    """The run of a config file with what its section `topologies` says of machine `name`, and `overrides` over both.

    A file without the section fits every machine. Raises ConfigError for a name that the section lacks.
    """
    plain = load(Run, path, overrides)
    known = plain.value.topologies
    if name is None or not known:
        return plain
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path} has settings for {', '.join(known)}, not for {name}{hint}; add it under topologies")
    said = known[name]
    loaded = load(Run, path, (*(f"{key}={json.dumps(value)}" for key, value in said.items()), *overrides))
    mine = {text.split("=")[0] for text in overrides}
    return replace(loaded, where=loaded.where | {key: f"topologies.{name}" for key in said if key not in mine})
