"""The way of an image to its loss and of a sample to its PNG stays short."""

from benchmarks.walks import room, walks


def test_the_walks_enter_few_rooms() -> None:
    found = walks()
    rooms = {name: {room(file) for file in files} for name, files in found.items()}
    to_the_loss, to_the_png = rooms["an image to its loss"], rooms["a sample to its PNG"]
    assert {"data", "training", "objective", "model", "moe"} <= to_the_loss
    assert len(to_the_loss) <= 11
    assert {"generate", "pipeline", "samplers"} <= to_the_png
    assert len(to_the_png) <= 13
