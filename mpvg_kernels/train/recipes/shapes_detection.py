"""shapes_detection: a small ViT-Adapter with Mask R-CNN on small scenes that are made at the first start.

    mpvg train --recipe shapes_detection

Hardware: one core of any CPU. Time: 6 min 25 s (18 img/s on one core of an AMD EPYC with AVX-512).
Accuracy on the 200 held-out scenes after the last epoch, seed 0: box AP 54.2 %, mask AP 53.1 %. Other seeds were not
measured.
"""

from ..config import Adapter, Config, Data, Detection, Model, Optim, Sched

config = Config(
    task="detection",
    epochs=8,
    batch=4,
    eval_interval=4,
    threads=1,
    model=Model(
        name="mpvg_vit_adapter_tiny",
        scheme="mpvg",
        embed_dim=96,
        depth=4,
        num_heads=3,
        adapter=Adapter(pretrain_size=96, interactions=2, conv_inplane=16, deform_num_heads=3, deform_ratio=0.5),
    ),
    data=Data(name="shapes", workers=1),
    optim=Optim(lr=1e-3, weight_decay=0.05),
    sched=Sched(warmup_epochs=0.25),
    detection=Detection(
        short_sides=(80, 96, 112),
        max_side=112,
        crop_prob=0.0,
        final_crop=None,
        test_short_side=96,
        test_max_side=96,
        anchor_scale=4.0,
        width=48,
        box_width=128,
        rpn_samples=64,
        roi_samples=32,
        proposals=100,
    ),
)
