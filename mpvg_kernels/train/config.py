"""What a training run can be told: nested dataclasses, a line a field, on the command line as `--SECTION.FIELD VALUE`.

A recipe is a value of `Config`; the command line changes single fields of it (`from_args`); the resolved whole is saved
in the run folder and read back from there (`from_dict`). Unknown names and illegal values are `InputError`s that name
the field; what is set and has no effect is told by `ignored`.
"""

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from . import InputError, near_matches


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a ViT-Adapter has besides its ViT, for detection and segmentation. A field left at None is the model's own
    default."""

    pretrain_size: int | None = None
    """Side in pixels of the images that the table of the position embedding is made for: the classification run's, or
    where there is none that of this run's own. Other images get it resized."""
    window_size: int | None = None
    """Side of the attention's windows in tokens; None: every layer sees the whole image."""
    global_layers: tuple[int, ...] = ()
    """Layers that see the whole image where window_size is set."""
    interactions: int | None = None
    """Groups of layers, each between an injector and an extractor, as equal as they can be."""
    conv_inplane: int | None = None
    """Channels of the spatial prior's first stage."""
    deform_num_heads: int | None = None
    """Heads of the deformable attention."""
    deform_ratio: float | None = None
    """Width of the deformable attention's values, relative to a token's."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. A field left at None is the model's own default."""

    name: str = "mpvg_deit_tiny_patch16_224"
    """timm name of the model; classes, channels and image size come from the data."""
    scheme: str | None = "mpvg"
    """How the position embedding travels: default, gap, lape, pvg, mpvg, ...; None for timm's own models."""
    patch_size: int | None = None
    """Side of a patch in pixels."""
    embed_dim: int | None = None
    """Width of a token."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads of a block."""
    drop_rate: float | None = None
    """Dropout before the classifier."""
    attn_drop_rate: float | None = None
    """Dropout of the attention weights."""
    drop_path_rate: float | None = None
    """Stochastic depth of the last block; the blocks before it get linearly less."""
    weights: str | None = None
    """Weights to start from: a file, a folder that timm wrote, or a run folder; another grid is resampled, a head of
    other classes starts anew."""
    pretrained: bool = False
    """Start from timm's published weights of the model, which are downloaded."""
    freeze: tuple[str, ...] = ()
    """Parts that do not train, by the beginning of their parameters' names: patch_embed blocks.0 ..."""
    linear_probe: bool = False
    """Train the classifier alone; everything else is frozen and stays in eval mode."""
    grad_checkpointing: bool = False
    """Keep the blocks' inputs alone for the backward pass and compute the rest again: less memory, more time."""
    channels_last: bool = False
    """Channels-last memory format of images and convolution weights."""
    adapter: Adapter = Adapter()


@dataclasses.dataclass(frozen=True)
class Data:
    """The images."""

    name: str = "digits"
    """Dataset. Classification: digits (scikit-learn's 1,797 handwritten digits, a fifth held out), folder (a folder or
    tar file of images, a folder for each class), or any name of timm's create_dataset: torch/cifar100, hfds/...,
    wds/... Detection: coco (any folder in COCO's format). Segmentation: masks (a folder of images and one of label
    maps, ADE20K too). Both: shapes (small scenes that are made from a seed)."""
    root: str | None = None
    """Where the images are; a folder may have train/ and val/ (or validation/, test/) in it. data.name=shapes: where
    they are made, by default in the user's cache folder."""
    train_images: str | None = None
    """Detection and segmentation: folder of the training images, in data.root; None finds it."""
    train_annotations: str | None = None
    """Their annotations, in data.root: COCO's JSON file, or the folder of label maps; None finds them."""
    val_images: str | None = None
    """Folder of the held-out images; None finds it."""
    val_annotations: str | None = None
    """Their annotations; None finds them."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "validation"
    """Name of the split that is evaluated."""
    download: bool = False
    """Let torchvision or Hugging Face download the data set where it is missing."""
    num_classes: int | None = None
    """Number of classes, where the data set itself does not say."""
    img_size: tuple[int, int] | None = None
    """Height and width of the images that the model gets; None is the model's own size."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel (0 to 1) that is subtracted; None is the model's own."""
    std: tuple[float, ...] | None = None
    """Deviation of each channel that is divided by; None is the model's own."""
    crop_pct: float | None = None
    """Evaluation: share of the resized image's side that the centre crop keeps; None is the model's own."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    """Evaluation: how images are resized."""
    workers: int = 4
    """Processes that decode and augment images, for each training process; 0 does it in the training process."""
    max_bad_share: float = 0.01
    """Share of the training images that may be unreadable (they are replaced) before the run stops."""
    epoch_updates: int | None = None
    """Updates of an epoch, for runs that count updates: passes over the images follow one another and epochs begin and
    end anywhere in them (in a stream at its beginning, and at most a pass). None: an epoch is a pass."""
    max_test_images: int | None = None
    """Most held-out images that are evaluated while training, evenly over the data set, of a stream the first ones;
    None takes all."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """Random affine maps of the digits, each with draws of its own, uniform in +- the value."""

    prob: float = 0.6
    """Share of the images that are changed; the others stay as sharp as the held-out ones."""
    degrees: float = 10.0
    """Rotation in degrees."""
    translate: float = 0.06
    """Shift along each axis, as a share of the image's side."""
    scale: float = 0.1
    """Relative change of size."""
    shear: float = 0.1
    """Horizontal shift for a unit of height."""


@dataclasses.dataclass(frozen=True)
class Aug:
    """Augmentation of the training images."""

    affine: Affine = Affine()
    crop: Literal["resized", "padded"] = "resized"
    """resized: a random part, resized (timm's default); padded: resized whole, then cropped with a margin around."""
    scale: tuple[float, float] = (0.08, 1.0)
    """crop=resized: least and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """crop=resized: least and largest aspect ratio."""
    padding: int = 28
    """crop=padded: the margin in pixels."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "random"] = "bicubic"
    """How images are resized."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Range of random brightness, contrast and saturation; not used together with auto_augment, as in timm."""
    auto_augment: str | None = None
    """Policy in timm's notation, for example rand-m9-mstd0.5-inc1."""
    repeats: int = 1
    """Repeated augmentation: how often an image comes in an epoch, augmented anew each time; epochs stay as long."""
    erase_prob: float = 0.0
    """Probability that a random rectangle is replaced by noise (random erasing)."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off. With mixup too, each batch takes one of them at random."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimizer. Biases, 1-D parameters and what the model names in no_weight_decay() are not decayed."""

    name: str = "adamw"
    """timm name of the optimizer."""
    lr: float = 1e-3
    """Peak learning rate; see lr_base_batch."""
    lr_base_batch: int | None = None
    """Batch that lr is meant for: the peak is lr x batch / lr_base_batch. None: lr as it is."""
    weight_decay: float = 0.05
    """Weight decay."""
    decay_pos_embed: bool = False
    """Decay the position embedding as well."""
    momentum: float = 0.9
    """Momentum, for optimizers that have one."""
    betas: tuple[float, float] | None = None
    """Adam's two decay rates; None is the optimizer's own."""
    eps: float | None = None
    """Adam's epsilon; None is the optimizer's own."""
    layer_decay: float | None = None
    """Layer-wise decay of the learning rate: a factor for each layer below the head."""
    backbone_lr_scale: float = 1.0
    """Learning rate of everything but the head, relative to the head's; min_lr is the same for both."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, evaluated and saved beside them; None keeps none."""
    ema_warmup: bool = False
    """Start the average with a smaller decay that grows to ema_decay."""
    max_skipped: int = 10
    """Updates in a row that may be skipped for a loss or gradient that is not finite before the run stops."""


@dataclasses.dataclass(frozen=True)
class Sched:
    """The learning rate over the run: a linear warm-up, then a curve down to min_lr."""

    name: Literal["cosine", "poly", "step", "constant"] = "cosine"
    """Curve after the warm-up."""
    per: Literal["update", "epoch"] = "update"
    """How often the learning rate changes."""
    warmup_epochs: float = 3
    """Epochs of warm-up."""
    warmup_updates: int | None = None
    """Updates of warm-up, in place of warmup_epochs; sched.per has to be update."""
    warmup_prefix: bool = False
    """False: warm-up epochs count as epochs of the curve, which is entered where they end (timm's default). True: the
    curve starts after them and is as much shorter."""
    warmup_lr: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 1e-5
    """Learning rate at the curve's end."""
    scale_with_batch: bool = False
    """Let optim.lr_base_batch scale warmup_lr and min_lr too, as Swin does."""
    cooldown_epochs: int = 0
    """Epochs after the `epochs` of the curve, at min_lr; a step or constant schedule goes on in them."""
    decay_epochs: float = 30
    """name=step: epochs between two steps."""
    decay_at: tuple[float, ...] = ()
    """name=step: the epochs of the steps, in place of decay_epochs."""
    decay_rate: float = 0.1
    """name=step: the factor of a step; name=poly: the power."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The training loss; evaluation reports plain cross-entropy."""

    name: Literal["ce", "bce"] = "ce"
    """Softmax cross-entropy, or binary cross-entropy on every class."""
    smoothing: float = 0.0
    """Label smoothing."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """Learn from a teacher too, as DeiT does: soft (its probabilities) or hard (the class it prefers)."""
    teacher: str | None = None
    """timm name of the teacher."""
    teacher_weights: str | None = None
    """The teacher's weights, a file or a folder; None downloads timm's published ones."""
    distill_alpha: float = 0.5
    """Share of the teacher in the loss."""
    distill_tau: float = 1.0
    """Temperature of the soft probabilities."""


@dataclasses.dataclass(frozen=True)
class Detection:
    """task=detection: how images are resized, and what is kept of what a model finds. Sides are in pixels."""

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Training: the shorter side, one of these at random."""
    max_side: int = 1333
    """Most pixels of the longer side; wins over the shorter one's."""
    crop_prob: float = 0.5
    """Share of the training images that are resized, cropped and then resized as the others."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """The shorter side before that crop."""
    crop_sides: tuple[int, int] = (384, 600)
    """Least and largest side of the crop."""
    final_crop: tuple[int, int] | None = (1024, 1024)
    """Most height and width of a training image, to which larger ones are cropped; None crops none."""
    test_short_side: int = 800
    """Evaluation: the shorter side."""
    test_max_side: int = 1333
    """Evaluation: most pixels of the longer side."""
    anchor_scale: float = 8.0
    """Side of the RPN's square anchors, relative to the stride of their map."""
    score_threshold: float = 0.05
    """Least score of a detection that is kept."""
    nms_threshold: float = 0.5
    """Overlap (IoU) with a better one of its class at which a detection is dropped."""
    max_detections: int = 100
    """Most detections of an image."""
    width: int = 256
    """Channels of the feature pyramid, of the RPN and of the mask head."""
    box_width: int = 1024
    """Width of the box head's layers."""
    rpn_samples: int = 256
    """Anchors of an image that the RPN's losses are taken over."""
    roi_samples: int = 512
    """Proposals of an image that the heads' losses are taken over."""
    proposals: int = 1000
    """Proposals that the RPN keeps of an image."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """task=segmentation: labels, how images are resized, and how label maps are found. Sides are in pixels; training
    crops are of data.img_size."""

    ignore_label: int = 255
    """Label of pixels that count nowhere."""
    reduce_zero_label: bool = False
    """The label maps' 0 is ignored and their 1 is class 0, as in ADE20K."""
    short_side: int = 512
    """The shorter side of a whole image, before the random scale of training."""
    long_side: int = 2048
    """Most pixels of its longer side."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Training: least and largest factor of a random change of size."""
    cat_max_ratio: float = 0.75
    """Training: a crop in which one class has more of the pixels is drawn again, at most ten times."""
    photometric: bool = True
    """Training: random brightness, contrast, saturation and hue."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    width: int = 512
    """Channels of the decoder."""
    aux_width: int = 256
    """Channels of the auxiliary head."""
    drop_rate: float = 0.1
    """Dropout of channels before both heads' classifiers."""
    window: int | None = None
    """Evaluation: side of the windows that slide over an image; None takes it whole."""
    stride: int | None = None
    """Evaluation: pixels between two windows; None is two thirds of the window."""


@dataclasses.dataclass(frozen=True)
class Dist:
    """Several devices and machines: start `mpvg train` by torchrun or srun, one process for each device."""

    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp: weights on every device; fsdp: weights, gradients and optimizer state shared out (FSDP2)."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication: nccl between GPUs, gloo between CPUs."""
    micro_batch: int | None = None
    """Most images that a device takes at once; a larger share of the batch is taken in equal parts and their gradients
    added up. None takes the share whole."""
    sync_bn: bool = False
    """Batch norms use the statistics of all devices (CeiT has batch norms)."""
    timeout: float = 30.0
    """Minutes to wait for another process before giving up."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved for a resume, besides what a signal saves."""

    interval: int | None = None
    """Updates between two checkpoints; None saves at the end of every epoch only."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones; at least 2, so that a damaged one has another behind it."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What is written while training."""

    interval: int = 10
    """Updates between two lines of log.jsonl."""
    pos_interval: int | None = 100
    """Updates between two looks at the position embedding, besides those after the first and the last update: norm of
    LN'_l(pos) and its correlation with LN_l(x) in each layer, lines of kind `pos` in log.jsonl; None never looks."""
    tensorboard: bool | None = None
    """Write TensorBoard's files into the run folder; None does where tensorboard is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to; None does not."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of a device in the run's precision, for the model FLOP/s utilisation; None knows common GPUs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    task: Literal["classification", "detection", "segmentation"] = "classification"
    """What is learned: the class of an image (any model), objects with boxes and masks (Mask R-CNN), or the class of
    every pixel (UperNet); the last two on a model with four feature maps, such as mpvg_vit_adapter_tiny."""
    seed: int = 0
    """Seed of weights, order and augmentation; the held-out images do not depend on it."""
    epochs: int = 32
    """Passes over the training images, sched.cooldown_epochs aside."""
    batch: int = 64
    """Images of an update, over all devices; an epoch's last, incomplete batch is left out."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Automatic mixed precision: none (everything fp32), bf16, or fp16 with a loss scale."""
    compile: bool = False
    """Train through torch.compile."""
    deterministic: bool = False
    """On a GPU: deterministic algorithms alone, so that a resumed run is bitwise the uninterrupted one; on a CPU that
    always holds."""
    profile: bool = False
    """Write a torch.profiler trace of a few updates, and a table of the slowest operators, into RUN/profile."""
    eval_interval: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    device: str = "auto"
    """Device of the run: auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's own choice."""
    model: Model = Model()
    data: Data = Data()
    aug: Aug = Aug()
    optim: Optim = Optim()
    sched: Sched = Sched()
    loss: Loss = Loss()
    detection: Detection = Detection()
    segmentation: Segmentation = Segmentation()
    dist: Dist = Dist()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def __post_init__(self):
        def need(ok: bool, field: str, expected: str):
            if not ok:
                raise InputError(f"config field {field} is {get(self, field)!r}, expected {expected}")

        def share(field: str):
            need(0 <= get(self, field) <= 1, field, "0 to 1")

        def optional(field: str, ok, expected: str):
            value = get(self, field)
            need(value is None or ok(value), field, f"{expected}, or None")

        need(self.seed >= 0, "seed", "0 or more")
        need(self.epochs >= 1, "epochs", "1 or more")
        need(self.batch >= 1, "batch", "1 or more")
        need(self.eval_interval >= 1, "eval_interval", "1 or more")
        optional("threads", lambda v: v >= 1, "1 or more")
        for field in ("model.drop_rate", "model.attn_drop_rate", "model.drop_path_rate"):
            optional(field, lambda v: 0 <= v < 1, "0 or more and less than 1")
        need(not (self.model.weights and self.model.pretrained), "model.pretrained", "False where model.weights is set")
        need(
            not (self.model.linear_probe and self.model.freeze),
            "model.freeze",
            "nothing where model.linear_probe is set, which freezes all but the head",
        )
        optional("data.num_classes", lambda v: v >= 1, "1 or more")
        optional("data.img_size", lambda v: min(v) >= 1, "pixels")
        optional("data.crop_pct", lambda v: 0 < v <= 1, "more than 0 and at most 1")
        optional("data.std", lambda v: min(v) > 0, "more than 0")
        need(self.data.workers >= 0, "data.workers", "0 or more")
        optional("data.epoch_updates", lambda v: v >= 1, "1 or more")
        optional("data.max_test_images", lambda v: v >= 1, "1 or more")
        for field in ("data.max_bad_share", "aug.affine.prob", "aug.hflip", "aug.erase_prob", "aug.mix_prob"):
            share(field)
        share("aug.mix_switch_prob")
        share("loss.distill_alpha")
        need(0 <= self.aug.affine.scale < 1, "aug.affine.scale", "0 or more and less than 1")
        need(0 < self.aug.scale[0] <= self.aug.scale[1] <= 1, "aug.scale", "two shares of the area, least first")
        need(0 < self.aug.ratio[0] <= self.aug.ratio[1], "aug.ratio", "two ratios, least first")
        for field in ("aug.padding", "aug.color_jitter", "aug.mixup", "aug.cutmix"):
            need(get(self, field) >= 0, field, "0 or more")
        need(self.aug.repeats >= 1, "aug.repeats", "1 or more")
        need(self.optim.lr > 0, "optim.lr", "more than 0")
        optional("optim.lr_base_batch", lambda v: v >= 1, "1 or more")
        need(self.optim.weight_decay >= 0, "optim.weight_decay", "0 or more")
        need(0 <= self.optim.momentum < 1, "optim.momentum", "0 or more and less than 1")
        optional("optim.betas", lambda v: 0 <= min(v) <= max(v) < 1, "two numbers, 0 or more and less than 1")
        optional("optim.eps", lambda v: v >= 0, "0 or more")
        optional("optim.layer_decay", lambda v: 0 < v <= 1, "more than 0 and at most 1")
        need(self.optim.backbone_lr_scale > 0, "optim.backbone_lr_scale", "more than 0")
        need(
            self.optim.layer_decay is None or self.optim.backbone_lr_scale == 1,
            "optim.layer_decay",
            "None where optim.backbone_lr_scale is set",
        )
        optional("optim.clip_grad", lambda v: v > 0, "more than 0")
        optional("optim.ema_decay", lambda v: 0 <= v < 1, "0 or more and less than 1")
        need(self.optim.max_skipped >= 0, "optim.max_skipped", "0 or more")
        need(
            0 <= self.sched.warmup_epochs < self.epochs or self.sched.warmup_updates is not None,
            "sched.warmup_epochs",
            f"0 to below epochs = {self.epochs}",
        )
        need(
            self.sched.per == "update" or float(self.sched.warmup_epochs).is_integer(),
            "sched.warmup_epochs",
            "a whole number where sched.per is epoch",
        )
        for field in ("sched.warmup_lr", "sched.min_lr"):
            need(0 <= get(self, field) <= self.optim.lr, field, f"0 to optim.lr = {self.optim.lr:g}")
        need(self.sched.cooldown_epochs >= 0, "sched.cooldown_epochs", "0 or more")
        need(self.sched.decay_epochs > 0, "sched.decay_epochs", "more than 0")
        rising = all(0 < a < b for a, b in itertools.pairwise((*self.sched.decay_at, math.inf)))
        need(rising, "sched.decay_at", "epochs more than 0, each more than the one before")
        optional("sched.warmup_updates", lambda v: v >= 0, "0 or more")
        need(
            self.sched.warmup_updates is None or self.sched.per == "update",
            "sched.warmup_updates",
            "None where sched.per is epoch",
        )
        need(self.sched.decay_rate > 0, "sched.decay_rate", "more than 0")
        need(0 <= self.loss.smoothing < 1, "loss.smoothing", "0 or more and less than 1")
        need(self.loss.distill_tau > 0, "loss.distill_tau", "more than 0")
        self._check_dense(need, share, optional)
        need(
            self.loss.distillation == "none" or self.loss.teacher is not None,
            "loss.teacher",
            "a model's name where loss.distillation is set",
        )
        optional("dist.micro_batch", lambda v: v >= 1, "1 or more")
        need(self.dist.timeout > 0, "dist.timeout", "more than 0")
        optional("checkpoint.interval", lambda v: v >= 1, "1 or more")
        need(self.checkpoint.keep >= 2, "checkpoint.keep", "2 or more")
        need(self.log.interval >= 1, "log.interval", "1 or more")
        optional("log.pos_interval", lambda v: v >= 1, "1 or more")
        optional("log.peak_tflops", lambda v: v > 0, "more than 0")

    def _check_dense(self, need, share, optional) -> None:
        """The fields of detection and segmentation."""
        for field in ("pretrain_size", "window_size", "interactions", "conv_inplane", "deform_num_heads"):
            optional(f"model.adapter.{field}", lambda v: v >= 1, "1 or more")
        optional("model.adapter.deform_ratio", lambda v: v > 0, "more than 0")
        for field in ("short_sides", "crop_short_sides"):
            sides = get(self.detection, field)
            need(bool(sides) and min(sides) >= 1, f"detection.{field}", "pixels, one number or more")
        counts = ("width", "box_width", "rpn_samples", "roi_samples", "proposals")
        for field in ("max_side", "test_short_side", "test_max_side", "max_detections", *counts):
            need(get(self.detection, field) >= 1, f"detection.{field}", "1 or more")
        for field in ("crop_prob", "score_threshold", "nms_threshold"):
            share(f"detection.{field}")
        least, most = self.detection.crop_sides
        need(1 <= least <= most, "detection.crop_sides", "two sides in pixels, least first")
        optional("detection.final_crop", lambda v: min(v) >= 1, "height and width in pixels")
        need(self.detection.anchor_scale > 0, "detection.anchor_scale", "more than 0")
        fields = self.segmentation
        need(0 <= fields.ignore_label <= 65535, "segmentation.ignore_label", "0 to 65535")
        need(1 <= fields.short_side <= fields.long_side, "segmentation.short_side", "1 to segmentation.long_side")
        need(0 < fields.scale[0] <= fields.scale[1], "segmentation.scale", "two factors, least first")
        need(0 < fields.cat_max_ratio <= 1, "segmentation.cat_max_ratio", "more than 0 and at most 1")
        need(fields.aux_weight >= 0, "segmentation.aux_weight", "0 or more")
        for field in ("width", "aux_width"):
            need(getattr(fields, field) >= 1, f"segmentation.{field}", "1 or more")
        need(0 <= fields.drop_rate < 1, "segmentation.drop_rate", "0 or more and less than 1")
        optional("segmentation.window", lambda v: v >= 1, "1 or more")
        optional("segmentation.stride", lambda v: 1 <= v <= (fields.window or 0), "1 to segmentation.window")
        if self.task == "classification":
            return
        # What would be taken for an image's one label.
        for field in ("model.linear_probe", "aug.mixup", "aug.cutmix", "aug.erase_prob", "loss.smoothing"):
            need(not get(self, field), field, f"{get(Config(), field)!r} for task {self.task}")
        need(self.loss.distillation == "none", "loss.distillation", f"'none' for task {self.task}")
        need(self.loss.name == "ce", "loss.name", f"'ce' for task {self.task}")

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the cool-down included."""
        return self.epochs + self.sched.cooldown_epochs


def get(config: Any, name: str) -> Any:
    """The value of a field by its dotted name, for example `optim.lr`."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def fields(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every field with its dotted name, in order: seed, ..., model.name, ..., aug.affine.prob, ..."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def field_names() -> list[str]:
    """Every field's dotted name, in order."""
    return [name for name, _ in fields()]


def without_effect(config: Config) -> dict[str, str]:
    """The fields that have no effect together with the others, each with the reason."""
    digits, mixing = config.data.name == "digits", bool(config.aug.mixup or config.aug.cutmix)
    dense = config.task != "classification"
    of_all_data = ("data.name", "data.epoch_updates", "data.max_test_images")
    of_dense = tuple(f"data.{part}_{what}" for part in ("train", "val") for what in ("images", "annotations"))
    of_others = [
        name
        for name in field_names()
        if (name.startswith(("detection.", "segmentation.")) and not name.startswith(f"{config.task}."))
        or (not dense and (name.startswith("model.adapter.") or name in of_dense))
        or (dense and name.startswith("aug.") and name not in ("aug.hflip", "aug.repeats"))
        or (dense and name in ("model.drop_rate", "data.download", "data.crop_pct", "data.interpolation"))
        or (config.task == "detection" and name == "data.img_size")
    ]
    cases = [
        (True, f"task is {config.task}", of_others),
        # (no effect when, because, the fields)
        (not digits, "it is for data.name=digits", [n for n in field_names() if n.startswith("aug.affine.")]),
        (
            digits,
            "data.name is digits",
            [n for n in field_names() if n.startswith("data.") and n not in of_all_data]
            + ["aug.crop", "aug.scale", "aug.ratio", "aug.padding", "aug.interpolation"]
            + ["aug.hflip", "aug.color_jitter", "aug.auto_augment"],
        ),
        (not digits and config.aug.crop != "padded", "aug.crop is resized", ["aug.padding"]),
        (not digits and config.aug.crop != "resized", "aug.crop is padded", ["aug.scale", "aug.ratio"]),
        (not digits and config.aug.auto_augment is not None, "aug.auto_augment is set", ["aug.color_jitter"]),
        (not mixing, "neither aug.mixup nor aug.cutmix is on", ["aug.mix_prob"]),
        (not (config.aug.mixup and config.aug.cutmix), "one of mixup and CutMix is off", ["aug.mix_switch_prob"]),
        (config.optim.lr_base_batch is None, "optim.lr_base_batch is None", ["sched.scale_with_batch"]),
        (config.optim.ema_decay is None, "optim.ema_decay is None", ["optim.ema_warmup"]),
        (config.sched.name != "step", "sched.name is not step", ["sched.decay_epochs", "sched.decay_at"]),
        (bool(config.sched.decay_at), "sched.decay_at is set", ["sched.decay_epochs"]),
        (config.sched.warmup_updates is not None, "sched.warmup_updates is set", ["sched.warmup_epochs"]),
        (config.sched.name not in ("step", "poly"), "sched.name is neither step nor poly", ["sched.decay_rate"]),
        (config.sched.name in ("step", "constant"), f"sched.name is {config.sched.name}", ["sched.min_lr"]),
        (
            not (config.sched.warmup_epochs if config.sched.warmup_updates is None else config.sched.warmup_updates),
            "there is no warm-up",
            ["sched.warmup_lr", "sched.warmup_prefix"],
        ),
        (
            config.loss.distillation == "none",
            "loss.distillation is none",
            ["loss.teacher", "loss.teacher_weights", "loss.distill_alpha", "loss.distill_tau"],
        ),
        (config.loss.distillation == "hard", "loss.distillation is hard", ["loss.distill_tau"]),
    ]
    return {name: reason for when, reason, names in cases if when for name in names}


def ignored(config: Config) -> list[str]:
    """Sentences on fields that are set, and have no effect together with the others."""
    default = Config()
    return [
        f"config field {name} has no effect: {reason}"
        for name, reason in without_effect(config).items()
        if get(config, name) != get(default, name)
    ]


def check_names(names: list[str], options: Iterable[str] = ()) -> None:
    """Raise InputError for the first dotted name that is no field of `Config`; `options` are near misses too."""
    known = field_names()
    suffix = "; `mpvg train --recipe NAME --print-config` lists them all"
    for name in names:
        if name not in known:
            if close := near_matches(name.replace("_", "-"), options):
                raise InputError(f"unknown option or config field {name!r}{close}")
            # `lr` alone means `optim.lr`
            close = next((f"; did you mean {k!r}?" for k in known if k.endswith(f".{name}")), near_matches(name, known))
            raise InputError(f"unknown config field {name!r}{close or suffix}")


def check_options(args: list[str], own: Iterable[str] = ()) -> None:
    """Raise InputError for the first option of a command line that names no field; `own` are the command's options."""
    # Ours and not tyro's check, for its one sentence; a single dash may start a negative number.
    options = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--") and arg != "--help"]
    check_names([option.replace("-", "_") for option in options], own)


def from_args(default: Config, args: list[str], prog: str = "mpvg train --recipe NAME") -> Config:
    """`default` with the fields that the command line sets, for example ["--optim.lr", "1e-3", "--epochs=2"].

    A switch without a value (`--compile`) is turned on.

    Raises:
        InputError: an unknown field, or a value of the wrong kind.
        SystemExit: after printing the help, when `args` ask for it.
    """
    import tyro

    check_options(args)
    switches = {f"--{name}" for name, field in fields() if field.type in (bool, bool | None)}
    given: list[str] = []
    for i, arg in enumerate(args):
        following = args[i + 1] if i + 1 < len(args) else "--"
        given.append(arg)
        if arg.replace("-", "_").replace("__", "--", 1) in switches and following.startswith("--"):
            given.append("True")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            markers = (tyro.conf.FlagConversionOff,)  # --compile True, a value after every name
            return tyro.cli(Config, default=default, args=given, prog=prog, use_underscores=True, config=markers)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        # tyro draws a box of paragraphs around its message: the first paragraph is what was wrong.
        lines = [line.strip("│ ") for line in message.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        text = " ".join(lines[: next((i for i, line in enumerate(lines) if not line or line[0] == "─"), None)])
        raise InputError(text.rstrip(".") or "the config fields on the command line can't be read") from None


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], written_by: str | None = None) -> Config:
    """The config that `to_dict` wrote, JSON's lists for tuples included.

    Args:
        values: nested dictionaries; what is left out takes its default.
        written_by: the version of mpvg_kernels that wrote it, for the error.

    Raises:
        InputError: a field that this version does not know, or a value of the wrong kind.
    """
    try:
        try:
            return _build(Config, values)
        except (TypeError, AttributeError, ValueError) as error:  # from the checks of the values
            raise InputError(
                f"the config has a value of the wrong kind ({error}); expected what --print-config prints"
            ) from None
    except InputError as error:
        if written_by is None:
            raise
        from .. import __version__

        versions = f"the config was written by mpvg_kernels {written_by}, this is {__version__}"
        raise InputError(f"{error} ({versions})") from None


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    sections = {field.name: field.type for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.type)}
    names = {field.name for field in dataclasses.fields(cls)}
    check_names([f"{prefix}{name}" for name in values if name not in names])
    return cls(
        **{
            name: _build(sections[name], value, f"{prefix}{name}.")
            if name in sections
            else tuple(value)
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
    )
