# ruff: noqa: F401
"""What the fork server of `tests.processes` imports once. Nothing here may compute: threads do not survive a fork."""

import accelerate
import diffusers
import torchmetrics
import torchvision

import ditmoe.generate
import ditmoe.image_sets
import ditmoe.pipeline
import ditmoe.report
import ditmoe.training
import eval.fid
import eval.processes
