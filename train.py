"""Train, sample, score, report: `python train.py [PRESET | RUN/config.json] [--section.field value ...]`."""

import sys

from ditmoe import cli


def main() -> None:
    """Parse; train or resume; then sample, score and write the run's page."""
    config = cli.parse_train(sys.argv[1:])
    from ditmoe.analysis.budget import describe
    from ditmoe.data.open import reference
    from ditmoe.launch.start import shutdown
    from ditmoe.report import progress, write
    from ditmoe.training.loop import open_images, train
    from eval import fid, judge

    if config.dry_run:
        return print(describe(config))
    try:
        images = open_images(config)
        score = None if images.is_latent else lambda x: fid.score(x, reference(images, config.seed))
        news = train(config, images, lambda n, pipe: progress.progress(config, n, pipe, score), sys.argv)
        write.finish(config, score, judge.judge, news=news)
    finally:
        shutdown()


if __name__ == "__main__":
    sys.exit(cli.run(main))
