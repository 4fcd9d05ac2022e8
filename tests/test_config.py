"""The config: fields from the command line, bad values, settings without effect, what other versions wrote."""

import json

import pytest

import mpvg_kernels as mk
from mpvg_kernels.train import InputError, config, recipes

DEFAULT = config.Config()


def test_fields_from_the_command_line():
    args = "--optim.lr 1e-3 --epochs=7 --model.scheme None --model.embed-dim 48 --compile --amp bf16".split()
    found = config.from_args(DEFAULT, args)
    assert (found.optim.lr, found.epochs, found.model.scheme, found.model.embed_dim) == (1e-3, 7, None, 48)
    assert (found.compile, found.amp) == (True, "bf16")
    assert found.aug == DEFAULT.aug and found.model.depth == DEFAULT.model.depth  # the rest is the recipe's


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model.dpeth 3", "unknown config field 'model.dpeth'; did you mean 'model.depth'"),
        ("--lr 1", "unknown config field 'lr'; did you mean 'optim.lr'"),
        ("--qqq 1", "unknown config field 'qqq'; `mpvg train --recipe NAME --print-config` lists them all"),
        ("--model.depth x", "--model.depth"),
        ("--amp fp8", "'--amp'. Expected one of"),
        ("--seed", "Missing value for argument '--seed'"),
        ("--epochs 3 4", "Unrecognized options: 4"),
        ("--epochs 0", "config field epochs is 0, expected 1 or more"),
        ("--epochs 1", "config field sched.warmup_epochs is 3, expected 0 to below epochs = 1"),
        ("--seed -1", "config field seed is -1, expected 0 or more"),
        ("--batch 0", "config field batch is 0"),
        ("--threads 0", "config field threads is 0, expected 1 or more, or None"),
        ("--optim.lr nan", "config field optim.lr is nan, expected more than 0"),
        ("--sched.min_lr 1", "config field sched.min_lr is 1.0, expected 0 to optim.lr"),
        ("--sched.warmup_lr 1", "config field sched.warmup_lr is 1.0"),
        ("--loss.smoothing 1", "config field loss.smoothing is 1.0"),
        ("--aug.affine.prob 2", "config field aug.affine.prob is 2.0, expected 0 to 1"),
        ("--aug.prob 2", "unknown config field 'aug.prob'; did you mean"),
        ("--aug.affine.scale 1", "config field aug.affine.scale is 1.0"),
        ("--aug.scale 0.5 0.1", "config field aug.scale is (0.5, 0.1), expected two shares of the area, least first"),
        ("--data.img_size 224", "--data.img_size"),
        ("--data.img_size 224 0", "config field data.img_size is (224, 0), expected pixels, or None"),
        ("--optim.betas 0.9 1", "config field optim.betas is (0.9, 1.0)"),
        ("--optim.clip_grad 0", "config field optim.clip_grad is 0.0, expected more than 0, or None"),
        ("--optim.ema_decay 1", "config field optim.ema_decay is 1.0"),
        ("--model.weights x --model.pretrained", "model.pretrained is True, expected False where model.weights is set"),
        ("--model.linear_probe --model.freeze blocks", "config field model.freeze is ('blocks',), expected nothing"),
        ("--loss.distillation hard", "config field loss.teacher is None, expected a model's name where"),
        ("--checkpoint.keep 1", "config field checkpoint.keep is 1, expected 2 or more"),
        ("--sched.per epoch --sched.warmup_epochs 1.5", "a whole number where sched.per is epoch"),
        ("--dist.micro_batch 0", "config field dist.micro_batch is 0"),
        ("--optim.weight_decay -1", "config field optim.weight_decay is -1.0"),
        ("--log.interval 0", "config field log.interval is 0"),
        ("--data.epoch_updates 0", "config field data.epoch_updates is 0, expected 1 or more, or None"),
        ("--data.max_test_images 0", "config field data.max_test_images is 0, expected 1 or more, or None"),
    ],
)
def test_bad_fields(args, message):
    with pytest.raises(InputError) as error:
        config.from_args(DEFAULT, args.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_switches_need_no_value():
    for args, value in (("--compile", True), ("--compile --seed 3", True), ("--compile False", False)):
        assert config.from_args(DEFAULT, args.split()).compile is value
    assert config.from_args(DEFAULT, ["--model.grad-checkpointing", "--log.tensorboard"]).log.tensorboard is True


@pytest.mark.parametrize("name", recipes.names())
def test_config_survives_json(name):
    recipe = recipes.load(name)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    "args, fields",
    [
        ("--data.root x --aug.hflip 0", "data.root aug.hflip"),
        ("--data.name folder --aug.affine.prob 0", "aug.affine.prob"),
        ("--data.name folder --aug.crop padded --aug.scale 0.5 1", "aug.scale"),
        ("--data.name folder --aug.auto_augment rand-m9 --aug.color_jitter 0.1", "aug.color_jitter"),
        ("--aug.mixup 0.8 --aug.mix_switch_prob 0.1", "aug.mix_switch_prob"),
        ("--aug.mixup 0.8 --aug.cutmix 1 --aug.mix_switch_prob 0.1 --aug.mix_prob 0.5", ""),
        (
            "--aug.mix_prob 0.5 --sched.scale_with_batch --optim.ema_warmup",
            "aug.mix_prob sched.scale_with_batch optim.ema_warmup",
        ),
        ("--sched.name constant --sched.min_lr 1e-4 --sched.decay_rate 0.5", "sched.min_lr sched.decay_rate"),
        ("--loss.teacher x --loss.distill_tau 2", "loss.teacher loss.distill_tau"),
        ("--loss.distillation hard --loss.teacher x --loss.distill_tau 2", "loss.distill_tau"),
    ],
)
def test_fields_without_effect(args, fields):
    said = config.ignored(config.from_args(DEFAULT, args.split()))
    assert sorted(line.split()[2] for line in said) == sorted(fields.split())


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_set_nothing_without_effect(name):
    assert config.ignored(recipes.load(name)) == []


def test_config_from_another_version():
    values = config.to_dict(DEFAULT)
    values["optim"]["momentun"] = 0.9
    expected = "unknown config field 'optim.momentun'; did you mean 'optim.momentum'"
    with pytest.raises(InputError, match=expected):
        config.from_dict(values)
    with pytest.raises(InputError, match=rf"{expected}.*written by mpvg_kernels 7.2, this is {mk.__version__}"):
        config.from_dict(values, "7.2")


def test_every_field_is_explained(capsys):
    with pytest.raises(SystemExit) as done:
        config.from_args(DEFAULT, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name in config.field_names():
        start = text.index(f"--{name} ")
        assert "(default" in text[start : start + 800]
    assert "Stochastic depth" in text  # the docstrings are there, not the names alone
