"""The contest of rivals as a table."""

from statistics import mean, stdev

from benchmarks.rows import Row


def table(sizes: dict[str, tuple[int, int]], trained: dict[str, Row], scores: dict[str, list[Row]], real: Row) -> str:
    """Markdown: a row for each contestant, of `sizes` parameters (in all, activated), and for the held-out images."""
    names = [name for name in real if name.startswith("fd_")] + ["recognised", "precision", "recall"]
    head = ["parameters (activated)", "rate", "guidance", "images/s", "steps", "images", *names]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for name, run in trained.items():
        total, active = (f"{count / 1e6:.2f} M" for count in sizes[name])
        size = total if total == active else f"{total} ({active})"
        cells = [name, size, f"{run['rate']:g}" + "*" * run["edge"], f"{scores[name][0]['cfg']:g}"]
        cells += [f"{run['images_per_second']:.0f}", f"{run['steps']:,}", f"{run['images']:,}"]
        lines.append("| " + " | ".join(cells + [spread([row[n] for row in scores[name]], n) for n in names]) + " |")
    lines.append("| real" + " |" * 7 + " " + " | ".join(spread([real[n]], n) for n in names) + " |")
    return "\n".join(lines) + "\n\n*: the best of its learning rates is the lowest or the highest that was tried."


def spread(values: list[float], name: str) -> str:
    """Mean over the seeds, and their standard deviation."""
    scale, digits = (1.0, 4) if name.startswith("fd_") else (100.0, 1)
    text = f"{scale * mean(values):.{digits}f}" + (f" ± {scale * stdev(values):.{digits}f}" if values[1:] else "")
    return text if scale == 1 else text + " %"
