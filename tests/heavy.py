# ruff: noqa: F401
"""What the fork server of `tests.processes` imports once. Nothing here may compute: threads do not survive a fork."""

import accelerate
import diffusers
import torchmetrics
import torchvision

import ditmoe.generate.draw
import ditmoe.generate.request
import ditmoe.pipeline
import ditmoe.report.write
import ditmoe.training.loop
import eval.fid
import eval.processes
