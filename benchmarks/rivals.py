"""Our preset, its dense twin and diffusers' UNet and DiT, trained for the same wall clock and scored in the same way.

    python -m benchmarks.rivals --minutes 20 --out runs/rivals [--preset fashion] [--only ours unet ...] [--score-only]

All see the same images in the same order with the same noise and dropped labels. First the steps of all are timed
in turns, on the same threads: each then makes as many as fit into the minutes, however busy the machine is by then,
its learning rate going up over the first 2 % of them and down to zero. The twin of "unet" and "dit", which have the
preset's parameters, with "-active" has those that a token activates. Each has the best of three learning rates
(runs of a fifth of the time) and the best of some guidance scales, by the same rule: the lowest distance by
`--tune-extractor` of images of a seed that is not reported. Each network runs in the precision, compiled or not, a
diffusers one also with the attention or memory layout, in which it is fastest here. A line of `rows.jsonl` is one
(contestant, phase, value); lines that are there are not made again, and the averaged weights of the long runs are
kept. Ends with a table.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from shutil import copy2
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rival_models import OPTIONS
from benchmarks.rival_options import TUNE_SEED, parsed
from benchmarks.rival_table import table
from benchmarks.rival_training import NAMES, WARM_UP, Contestant, Training, contestants
from benchmarks.rows import Row, Rows
from benchmarks.scoring import Images, Judge, precision
from benchmarks.timing import machine, round_robin
from ditmoe.config.file import trained_by
from ditmoe.config.presets import PRESETS
from ditmoe.data.open import open_data
from ditmoe.data.pixels import to_pixels
from ditmoe.launch import start
from ditmoe.objective import scheduler_config
from ditmoe.pipeline.folder import shift_option, trained_steps
from samplers import image_generators, initial_noise, sample
from samplers.catalog import scheduler_for

FACTORS = (0.5, 1.0, 2.0)  # of the preset's rate, for it and its twin
RATES = (5e-4, 1.4e-3, 4e-3)  # of AdamW, for the rivals


class Contest:
    """The phases, each of which finds in the file what it has done before."""

    speeds: dict[str, float]  # steps a second

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.preset, self.rows = args, PRESETS[args.preset], Rows(args.out / "rows.jsonl")
        model = self.preset.model
        self.data = open_data(self.preset.data, size=model.sample_size, channels=model.in_channels)
        self.classes = sorted(self.data.id2label)
        self.all = contestants(args, len(self.classes))
        names = {args.tune_extractor, *args.extractors}
        self.judges = {name: Judge(self.preset, args.cache, name, args.num_ref) for name in names}
        sampling = self.preset.sample
        self.drawing: Row = {"sampler": args.sampler or sampling.sampler, "calls": args.calls or sampling.steps}
        self.drawing |= shift_option(self.drawing["sampler"], None if args.sampler else sampling.flow_shift)
        self.tuning = {"tune_extractor": args.tune_extractor, "tune_num": args.tune_num, **self.drawing}

    def once(self, key: Row, make: Callable[[], Row]) -> Row:
        """The line of this key, made unless it is there."""
        return self.rows.once({"preset": self.args.preset, **key}, make)

    def way(self, who: Contestant) -> Row:
        """The precision, a diffusers network's option, and compiled or not, that train the most images a second."""
        size = min(32, who.config.train.batch_size)

        def timed(ways: Sequence[Row]) -> dict[str, float]:
            steps = {json.dumps(way): self.for_timing(who, way, size).step for way in ways}
            return {name: round(size / seconds, 1) for name, seconds in round_robin(steps, 3).items()}

        def make() -> Row:
            speeds: dict[str, float] = {}
            ways: Sequence[Row] = [
                {"precision": precision, "option": option, "compile": False}
                for precision in ("fp32", "bf16") for option in OPTIONS.get(who.kind, [""])
            ]  # fmt: skip
            for _ in range(2 if self.args.compile else 1):
                speeds |= timed(ways)
                best: Row = json.loads(max(speeds, key=speeds.__getitem__))
                ways = [{**best, "compile": True}]
            return {**best, "timed": speeds}

        key = {"contestant": who.name, "config": who.digest, "phase": "way", "compiled": self.args.compile}
        return self.once(key, make)

    def for_timing(self, who: Contestant, way: Row, batch: int = 0) -> Training:
        """A run past its warm-up: at the rates there, what starts at zero stays so small that products are slow."""
        training = Training(who, self.data, way, 1e-3, 10**5, batch)
        training.steps = round(WARM_UP * training.total)
        return training

    def time_all(self, chosen: Sequence[Contestant]) -> dict[str, float]:
        """Steps a second of these and what else was timed with them: the first such line that has all of them."""
        wanted = {who.name + "-" + who.digest for who in chosen}
        for row in self.rows:
            if row["phase"] == "speed" and row["preset"] == self.args.preset and wanted <= row["speeds"].keys():
                return dict(row["speeds"])
        runs = {who.name + "-" + who.digest: self.for_timing(who, self.way(who)) for who in chosen}

        def turn(training: Training) -> None:
            for _ in range(4):
                training.step()

        seconds = round_robin({name: partial(turn, run) for name, run in runs.items()}, self.args.rounds)
        speeds = {name: 4 / value for name, value in seconds.items()}
        key = {"preset": self.args.preset, "contestant": "all", "phase": "speed"}
        self.rows.add({**key, "speeds": speeds, "machine": machine()})
        return speeds

    def images(self, net: Any, way: Row, num: int, cfg: float, seed: int) -> Images:
        """`num` images, classes in turn: image i is a function of (seed, i, its label) alone."""
        calls, model, parts = self.drawing["calls"], self.preset.model, []
        options = {name: value for name, value in self.drawing.items() if name not in ("sampler", "calls")}
        scheduler = scheduler_for(self.drawing["sampler"], scheduler_config(self.preset.objective), calls, options)
        shape, device = (model.in_channels, model.sample_size, model.sample_size), next(net.parameters()).device
        for first in range(0, num, 250):
            indices = range(first, min(first + 250, num))
            generators = image_generators(seed, indices)
            with precision(way["precision"]):
                parts.append(sample(
                    net, scheduler, initial_noise(generators, shape, device), class_labels=self.labels(indices),
                    num_inference_steps=calls, null_label=net.null_label, guidance_scale=cfg,
                    generators=generators,
                ))  # fmt: skip
        return to_pixels(torch.cat(parts))

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The classes in turn."""
        return [self.classes[i % len(self.classes)] for i in indices]

    def tune_distance(self, net: Any, way: Row, cfg: float) -> float | None:
        """What settings are chosen by; None where the images are not finite."""
        try:
            images = self.images(net, way, self.args.tune_num, cfg, TUNE_SEED)
        except FloatingPointError:
            return None
        return self.judges[self.args.tune_extractor].distance(images)

    def steps(self, who: Contestant, minutes: float) -> int:
        """How many fit into them."""
        return max(1, round(60 * minutes * self.speeds[who.name]))

    def rate(self, who: Contestant) -> Row:
        """The line of the learning rate that ends the short runs best, without guidance; and what was tried."""
        way, minutes, rows = self.way(who), self.args.tune_minutes or self.args.minutes / 5, []
        peak = self.preset.train.learning_rate
        rates = sorted(self.args.rates or (RATES if who.kind != "ours" else [factor * peak for factor in FACTORS]))

        def make(rate: float) -> Row:
            training = Training(who, self.data, way, rate, self.steps(who, minutes))
            training.go()
            fd = None if training.diverged else self.tune_distance(training.state.ema, way, 1.0)
            return {"fd": fd, **training.facts()}

        for rate in rates:
            key = {"contestant": who.name, "config": who.digest, "phase": "tune", "minutes": minutes, "rate": rate}
            key |= self.tuning
            rows.append(self.once(key, partial(make, rate)))
        best = min(rows, key=lambda row: math.inf if row["fd"] is None else row["fd"])
        return {**best, "rates": rates, "edge": best["rate"] in (rates[0], rates[-1])}

    def trained(self, chosen: list[Contestant]) -> dict[str, Row]:
        """The lines of the long runs, made one after the other."""
        key = {"preset": self.args.preset, "phase": "train", "minutes": self.args.minutes}
        if self.args.score_only:
            there = {(row["contestant"], row["config"]): row for row in self.rows if key.items() <= row.items()}
            return {who.name: there[who.name, who.digest] for who in chosen if (who.name, who.digest) in there}
        timed = self.time_all(chosen)
        self.speeds = {who.name: timed[who.name + "-" + who.digest] for who in chosen}
        rates = {who.name: self.rate(who) for who in chosen if not (self.args.ours and who.name == "ours")}
        found = {}
        for who in chosen:
            if self.args.ours and who.name == "ours":
                found[who.name] = self.once(*self.finished())
                continue
            key |= {"contestant": who.name, "config": who.digest, "rate": rates[who.name]["rate"]}
            found[who.name] = self.once(key, partial(self.train, who, dict(key), rates[who.name]))
        return found

    def finished(self) -> tuple[Row, Callable[[], Row]]:
        """Key and line of `--ours`: a run of the preset that another command made. ValueError for any other."""
        place, config = self.args.ours / "model", trained_by(self.args.ours)
        free = {"out": self.preset.out, "sample": self.preset.sample, "seed": self.preset.seed}
        train = {name: getattr(self.preset.train, name) for name in ("precision", "compile", "keep", "log_every")}
        if replace(config, train=replace(config.train, **train), **free) != self.preset:
            raise ValueError(f"--ours is {self.args.ours}, which is no run of the preset {self.args.preset}")
        if trained_steps(place) != config.max_steps:
            raise ValueError(f"--ours is {self.args.ours}, which is not finished; go on with it first")
        weights = place / "transformer" / "diffusion_pytorch_model.safetensors"
        name = f"{self.args.preset}-run-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}.safetensors"

        def make() -> Row:
            copy2(weights, self.args.out / name)
            images = config.max_steps * config.train.batch_size
            rate, speed = config.train.learning_rate, self.speeds["ours"] * config.train.batch_size
            known: Row = {"steps": config.max_steps, "images": images, "diverged": False, "rate": rate}
            return {**known, "rates": [rate], "edge": False, "images_per_second": speed, "machine": machine()}

        key = {"phase": "run", "contestant": "ours", "config": self.all["ours"].digest, "weights": name}
        return key, make

    def train(self, who: Contestant, key: Row, rate: Row) -> Row:
        """Train, write the averaged weights, and give what their line says."""
        speed = self.speeds[who.name]
        training = Training(who, self.data, self.way(who), key["rate"], self.steps(who, self.args.minutes))
        training.go()
        speed *= training.run.config.train.batch_size
        name = f"{key['preset']}-{key['contestant']}-{len(self.rows):03d}.safetensors"
        save_file({n: v.contiguous() for n, v in training.state.ema.state_dict().items()}, self.args.out / name)
        more = {"rates": rate["rates"], "edge": rate["edge"], "machine": machine(), "weights": name}
        return {**training.facts(), "images_per_second": speed, **more}

    def score(self, who: Contestant, trained: Row) -> list[Row]:
        """The lines of all seeds, at the guidance scale that the tuning seed finds best."""
        way, common = self.way(who), {"contestant": who.name, "weights": trained["weights"]}
        net = self.averaged(who, trained, way)

        def distance(scale: float) -> Row:
            return {"fd": self.tune_distance(net, way, scale)}

        tried = [
            self.once({**common, "phase": "guidance", "cfg": scale, **self.tuning}, partial(distance, scale))
            for scale in self.args.cfg
        ]
        cfg = min(tried, key=lambda row: math.inf if row["fd"] is None else row["fd"])["cfg"]

        def make(seed: int) -> Row:
            begun = time.perf_counter()
            images = self.images(net, way, self.args.num, cfg, seed)
            seconds = time.perf_counter() - begun
            return {"drawing_seconds": seconds, **self.judged(images, self.labels(range(len(images))))}

        key = {**common, "phase": "score", "cfg": cfg, **self.judging}
        return [self.once({**key, "seed": seed}, partial(make, seed)) for seed in self.args.seeds]

    def averaged(self, who: Contestant, trained: Row, way: Row) -> Any:
        """The network of a long run, with its averaged weights."""
        net = Training(who, self.data, way, 1e-4, 1).state.ema
        net.load_state_dict(load_file(self.args.out / trained["weights"]))
        return net

    @property
    def judging(self) -> Row:
        """The protocol of the scores."""
        return {"num": self.args.num, "extractors": self.args.extractors, "num_ref": self.args.num_ref, **self.drawing}

    def judged(self, images: Images, labels: Sequence[int]) -> Row:
        """Distances by all extractors, precision and recall by the last, and the share that is recognised."""
        found: Row = {}
        for name in self.args.extractors:
            scores = self.judges[name].judged(images, wanted=name == self.args.extractors[-1])
            found |= {"fd_" + name: scores.pop("fd"), **scores}
        return {**found, "recognised": self.judges[name].recognised(images, torch.tensor(labels).numpy())}

    def real(self) -> Row:
        """The same scores of held-out real images."""
        test = self.judges[self.args.extractors[0]].test
        num = min(self.args.num, len(test))
        key = {"contestant": "real", "phase": "score", **self.judging}
        return self.once(key, lambda: self.judged(test.images(range(num)), test.labels[:num].tolist()))


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(__doc__, argv)
    # runs of both precisions share Accelerate's state
    torch.set_autocast_dtype(start.best_device().type, torch.bfloat16)
    contest = Contest(args)
    print(f"{machine()}; preset {args.preset}, {args.minutes:g} minutes each\n")
    for who in contest.all.values():
        print(f"{who.name}: {who.parameters[0]:,} parameters, {who.parameters[1]:,} activated; {who.shape}")
    trained = contest.trained([contest.all[name] for name in NAMES if name in args.only])
    for name in [name for name, row in trained.items() if row["diverged"]]:
        print(f"{name} diverged in its long run and is not scored")
        del trained[name]
    sizes = {name: contest.all[name].parameters for name in trained}
    scores = {name: contest.score(contest.all[name], row) for name, row in trained.items()}
    print("\n" + table(sizes, trained, scores, contest.real()))


if __name__ == "__main__":
    main()
