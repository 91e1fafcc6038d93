"""The options of every command, as dataclasses that tyro reads; the docstring under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

RunArgument = Positional[Annotated[str, arg(metavar="RUN")]]
SourceArgument = Positional[Annotated[str | None, arg(metavar="SOURCE")]]
NameArgument = Positional[Annotated[str, arg(metavar="NAME")]]
FilesArgument = Positional[Annotated[tuple[str, ...], arg(metavar="FILE_OR_FOLDER")]]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where a SOURCE stands."""

    data_dir: str | None = None
    """Folder that holds <name>/<split>.parquet; else the environment variable NESTLING_DATA."""
    levels: str | None = None
    """Columns or depths that are the levels, coarse to fine: a,b,c."""
    taxonomy: str | None = None
    """A taxonomy file: JSON as in a bundle, or CSV edges parent,child."""
    qualify_names: bool = False
    """Tell classes of one name under two parents apart by path: a/x and b/x."""
    on_bad_image: Literal["error", "skip"] | None = None
    """An image that cannot be read: stop with its name, or leave it out and list it."""

    @property
    def level_names(self) -> tuple[str, ...] | None:
        """``levels`` as names."""
        return None if self.levels is None else tuple(name.strip() for name in self.levels.split(","))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train on real handwritten digits in about a minute, compare with what there is to beat, and report."""

    out: str = "runs/demo"
    """The run folder."""
    seeds: int = 3
    """How many seeds; three or more for any claim."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SourceOptions):
    """What every training is told."""

    source: SourceArgument = None
    """What to learn from."""
    method: str | None = None
    """nested, layerwise, robust, coins, end-to-end or flat-marginal; with --help it lists that method's fields. train
    chooses one from the labels where none is named."""
    config: str | None = None
    """A TOML file of fields; a run's recipe.toml serves as well."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = ()
    """Fields of the method's recipe, such as epochs=30 optimizer.lr=0.05."""
    backbone: str | None = None
    """auto (the default), resnet10, -18, -34 or -50, resnet18-16 (first width), or widths as conv:8-16/32/64."""
    image_size: int | None = None
    """Pixels a side; by default from the data."""
    init: str | None = None
    """A trained run or bundle, whose backbone the training starts from: fine-tuning."""
    weights: str | None = None
    """A safetensors file that the backbone starts from, such as timm's of the same name."""
    concepts: str | None = None
    """A CSV class,concept: the concepts become the coarsest level, named concept; or a column, no level then."""
    target_mix: str | None = None
    """A CSV class,share of the mix that a target has at one level, or of the column: the prior of q (robust)."""
    known: str | None = None
    """Pretend that only these fractions are labelled: coarse=1.0,middle=0.4,fine=0.1."""
    seed: int | None = None
    """Of weights, order and augmentation; 0 by default."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """auto (the default) is bf16 where the processor is fast at it, else fp32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    workers: int | None = None
    """Processes that decode pictures ahead, where these do not fit into memory; by default all cores but one, at most
    8. What comes out does not depend on it."""
    compile: bool = False
    """Compile the network with torch.compile: worth its minute or two where a GPU trains a large one for long."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainingOptions):
    """Train on SOURCE: a catalogue name, a folder tree, a CSV, TSV or Parquet file, or hf:owner/name."""

    hold_out: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="LEVEL=CLASS")] = ()
    """A class that training never sees, to be met as unknown on test rows, such as fine=husky; may be repeated."""
    baselines: bool = False
    """Train end-to-end and flat + marginal too, choose every learning rate on validation rows, and compare."""
    memory: str | None = None
    """Bytes of tensors that training may take, such as 2GB: chooses how many layers train together (layerwise)."""
    minutes: float | None = None
    """Keep to so many minutes: a few steps are timed, and the epochs chosen by that."""
    out: str | None = None
    """The run folder; by default runs/<source>-<method>-<hash of the settings>."""
    dry_run: bool = False
    """Print the stages, and the memory and time that they are estimated to take; train and write nothing."""


@dataclass(frozen=True, kw_only=True)
class Sweep(TrainingOptions):
    """Search a method's settings by validation rows, with Optuna; the same command goes on."""

    trials: int = 20
    """How many settings are tried in all, those of earlier calls and of other machines included."""
    storage: str | None = None
    """A database that several machines share, as a URL; by default an SQLite file in the folder."""
    out: str | None = None
    """The folder of the trials; by default runs/<source>-<method>-<hash of the settings>-sweep."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(SourceOptions):
    """Score a trained model on labelled rows, clean, distorted and attacked."""

    run: RunArgument
    """A run folder or a bundle folder."""
    source: str | None = None
    """Labelled rows; by default those that the run was trained for."""
    split: str = "test"
    """Which of its rows."""
    distort: tuple[str, ...] = ()
    """Distortions such as turbulence:1,0.5, half:top, blur:1, noise:0.1."""
    attack: tuple[str, ...] = ()
    """Attacks by the model's own gradient: fgsm:0.1, fgsm:flip, deepfool, saliency:0.1."""
    attack_level: str | None = None
    """The level whose head they are aimed at; by default the finest."""
    false_alarm: float | None = None
    """Call rows unknown at the rate at which known ones may be, such as 0.05, and measure how well that works."""
    unknown: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SOURCE")] = ()
    """Rows of no class that the model knows: another set; may be repeated. Classes that were held out are known of."""
    errors: bool = False
    """List the labels that are probably wrong, level by level, among rows that the model was not trained on."""
    folds: int | None = None
    """With --errors: judge every training row instead, by training so many models on the others' rows."""
    html: str | None = None
    """With --errors: write a page of thumbnails there."""
    json: str | None = None
    """Write the figures there; - for stdout."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Answer for pictures: the path down the tree, its confidences, and the deepest level that can be vouched for."""

    run: RunArgument
    """A run folder or a bundle folder."""
    files: FilesArgument
    """Pictures, or folders of them."""
    risk: float | None = None
    """The share of answers that may be wrong, such as 0.05: answers are as deep as that can be guaranteed, or none."""
    guarantee: Literal["ltt", "crc"] | None = None
    """ltt (the default): of the answers, with confidence 1 - delta; crc: of all rows, on average."""
    delta: float | None = None
    """The probability that the guarantee of ltt fails; 0.1 by default."""
    per: Literal["all", "level", "class"] | None = None
    """Over which answers the risk is kept: all of them (the default), those of each level, or those of each class."""
    false_alarm: float | None = None
    """Say what is of no known class, for which at most this share of the known are taken."""
    sets: bool = False
    """Add, for every level, the classes among which the true one is, but for the risk."""
    json: str | None = None
    """Write the answers there; - for stdout."""
    csv: str | None = None
    """Write a table there, line by line: after a stop the same command goes on."""
    workers: int | None = None
    """Processes that decode pictures ahead; by default all cores but one, at most 8, where there are many pictures."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Lint(SourceOptions):
    """Say what is wrong with SOURCE before anything is trained on it, row by row, each with a mend."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """As for train."""
    fix: Annotated[str | None, arg(metavar="OUT")] = None
    """Write a mended copy there, a new file or folder; the source itself is never touched."""
    json: str | None = None
    """Write all findings there; - for stdout."""


@dataclass(frozen=True, kw_only=True)
class Index(SourceOptions):
    """Make every picture or text of SOURCE ready to be searched: a folder of features, names and labels."""

    run: RunArgument
    """A run folder or a bundle folder."""
    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """What will be searched: as for train, or a folder of texts, or of pictures without class folders."""
    out: str | None = None
    """The folder to write; by default runs/index-<source>-<fingerprint of the model>."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Search(SourceOptions):
    """Find the pictures or texts of a gallery that are most like each query."""

    run: RunArgument
    """A run folder or a bundle folder."""
    queries: Positional[Annotated[tuple[str, ...], arg(metavar="QUERY")]]
    """Pictures or files of text, folders of them, rows of the gallery by name, or texts of two words or more."""
    gallery: Annotated[str, arg(metavar="SOURCE_OR_INDEX")]
    """What is searched: a source, or the folder that nestling index wrote."""
    k: Annotated[int, arg(aliases=["-k"])] = 10
    """How many are found for each query."""
    json: str | None = None
    """Write the answers there; - for stdout."""
    html: str | None = None
    """Write a page of thumbnails there, right and wrong marked where labels are known."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Measure a table of a paper, beside the paper's own numbers and with a verdict on each of its claims."""

    name: NameArgument
    """Of the table, such as layerwise-cifar10."""
    scale: str = "small"
    """smoke (a moment, which proves nothing), small (an hour on two cores) or paper (its own settings)."""
    seeds: int | None = None
    """How many seeds; three or more for any verdict. By default as the table says."""
    budget_minutes: float = 60.0
    """No training is begun after so long; the same command goes on from there."""
    json: str | None = None
    """Write the result there; - for stdout. By default into the folder of the runs."""
    data_dir: str | None = None
    """Folder that holds <name>/<split>.parquet; else the environment variable NESTLING_DATA."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """Compile every network with torch.compile."""
    rows: str | None = None
    """Only these rows of the table, as a,b,c; the same command without it adds the others."""
    jobs: int | None = None
    """How many trainings run at once; by default one on a GPU, else one per core."""
    out: str | None = None
    """The folder that holds the runs of every table, as <name>-<scale>; by default runs/reproduce."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print what a run was given, what was chosen automatically and why, and what it scored."""

    run: RunArgument
    """A run folder."""
