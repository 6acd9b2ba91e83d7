"""What the fork server of `tests.processes` imports once. Nothing here may compute: threads do not survive a fork."""

import accelerate  # noqa: F401
import diffusers  # noqa: F401
import torchmetrics  # noqa: F401
import torchvision  # noqa: F401

import ditmoe.generate
import ditmoe.image_sets
import ditmoe.pipeline
import ditmoe.report
import ditmoe.training
import eval.fid
import eval.processes  # noqa: F401
