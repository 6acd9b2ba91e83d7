"""Train, sample, score, report: `python train.py [PRESET | RUN/config.json] [--section.field value ...]`."""

import sys

from ditmoe import cli


def main() -> None:
    """Parse; train or resume; then sample, score and write the run's page."""
    config = cli.parse_train(sys.argv[1:])
    from ditmoe import data, generate, ranks, report, run_folder, training
    from eval.fid import score

    if config.dry_run:
        return print(training.describe(config))
    try:
        images = training.open_images(config)
        judge = None if images.is_latent else lambda x: score(x, data.reference(config.data, images, config.seed))
        news = training.train(config, images, lambda n, pipe: generate.progress(config, n, pipe, judge), sys.argv)
        if ranks.is_first() and (news or not (config.out / "index.html").exists()):
            with run_folder.locked(config):
                report.write(config.out, score=judge)
        if ranks.is_first():
            print(f"{config.out} is finished: see {config.out}/index.html, or python sample.py {config.out}")
    finally:
        ranks.shutdown()


if __name__ == "__main__":
    sys.exit(cli.run(main))
