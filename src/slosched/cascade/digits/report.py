"""The report of a measurement: report.md and report.json, curves, a page of images, and the product's
files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.digits_figures import draw_curves, draw_samples
from slosched.analysis.drawn import plain
from slosched.cascade.digits.data import as_stored
from slosched.cascade.digits.files import cascade_of, write_files
from slosched.cascade.digits.routing import ERROR_ORACLE, JUDGE, RANDOM
from slosched.cascade.digits.served import Served
from slosched.errors import MissingPackage
from slosched.output_files import write_file
from slosched.units import NS_PER_MS

REPORT = "report"
#: Images in a row of the page of images.
_IN_A_ROW = 20


def write_report(document: Mapping[str, Any], served: Served, out: Path) -> tuple[list[Path], str]:
    """Write everything into `out`; the paths, and what kept figures from being drawn (empty: nothing did).

    Raises as `write_file` does.
    """
    paths = [out / f"{REPORT}.json", out / f"{REPORT}.md"]
    text = json.dumps(plain(dict(document)), indent=1)
    write_file(paths[0], (text + "\n").encode())
    write_file(paths[1], report_text(document).encode())
    paths += write_files(cascade_of(document), out)
    try:
        paths.append(draw_curves(document, out))
        paths.append(draw_samples(sample_rows(served), out, _SAMPLES_TITLE))
    except MissingPackage as error:
        return paths, str(error)
    return paths, ""


_SAMPLES_TITLE = (
    "The judge accepts the half of the light images with the higher scores. Both rows are drawn at random; "
    "a heavy image\nunder a light one is that of the same request."
)


def sample_rows(served: Served) -> list[tuple[str, Any]]:
    """Rows of images: real, heavy, and both halves of the light ones with the heavy ones of the same
    requests.
    """
    random = np.random.default_rng(5)
    order = np.argsort(served.scores, kind="stable")
    half = len(order) // 2
    rejected, accepted = order[:half], order[half:]

    def chosen(places: Any) -> Any:
        return np.sort(random.choice(places, min(_IN_A_ROW, len(places)), replace=False))

    no, yes = chosen(rejected), chosen(accepted)
    ends = min(_IN_A_ROW, len(order))
    rows = [
        ("real, held out", served.real_part.ink[chosen(np.arange(len(served.real_part)))]),
        ("heavy", served.heavy[chosen(order)]),
        ("light, accepted", served.light[yes]),
        ("heavy, the same", served.heavy[yes]),
        ("light, rejected", served.light[no]),
        ("heavy, the same", served.heavy[no]),
        ("light, highest scores", served.light[order[-ends:]]),
        ("light, lowest scores", served.light[order[:ends]]),
    ]
    return [(name, as_stored(images)) for name, images in rows]


# ------------------------------------------------------------------------------------------ text


def report_text(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    ends, costs = document["ends"], document["cost_ms"]
    first = [
        [
            name,
            f"{ends[key]['frechet']:.2f} +- {ends[key]['error']:.2f}",
            f"{100 * ends[key]['accuracy']:.1f} %",
            f"{costs[key]:.2f}" if key in costs else "",
        ]
        for name, key in (("light only", "light"), ("heavy only", "heavy"), ("real images", "real"))
    ]
    return (
        "\n\n".join(
            [
                "# The cascade of digits, measured",
                _introduction(document),
                _table(["answers", "Frechet distance (digits)", "accuracy", "exec ms"], first),
                _by_share(document["curves"]),
                _compared(document),
                _on_the_judge(document["judge"]),
                _times(document["exec_ns"]),
            ]
        )
        + "\n"
    )


def _introduction(document: Mapping[str, Any]) -> str:
    real = document["ends"]["real"]
    return (
        f"{document['requests']} requests, each answered by both programs, against "
        f"{document['real_images']} real images that no network has seen. The distance is that of Frechet in "
        "the 24 features of the package's own classifier, with its standard error by bootstrap of answers and "
        "real images within each class (what comes of the real images is common to all rows). FID has other "
        "features and does not compare with it. With few images the distance is too large, which is why all "
        f"points have the same number of answers; the row of real images has {real['images']}. Accuracy is "
        "the share of answers that the classifier takes for the digit that was asked for. Exec ms: one "
        f"request's part of a batch of {document['cost_batch']}, one CPU thread, torch {document['torch']}."
    )


def _by_share(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    rows = []
    for place, point in enumerate(curves["judge"]):
        found = [f"{points[place]['frechet']:.2f}" for points in curves.values()]
        rows.append(
            [
                f"{point['heavy_share']:.1f}",
                *found,
                f"{point['cost_ms']:.2f}",
                f"{curves['random'][place]['cost_ms']:.2f}",
            ]
        )
    heads = ["heavy share", *curves, "ms, judge", "ms, random"]
    note = (
        "Distance by the share of requests that the heavy program answers. judge: those with the lowest "
        "scores. random: mean of ten orders; no light program runs before the heavy one. oracle: error knows "
        "both images of a request, and takes those that lie farthest apart in the classifier's features. "
        "oracle: greedy knows the held-out images themselves and takes step by step what lowers the distance "
        "most: a limit that no system reaches."
    )
    return f"{note}\n\n{_table(heads, rows)}"


def _compared(document: Mapping[str, Any]) -> str:
    found, mean = document["judge_less_random"], document["judge_less_random_mean"]
    rows = [
        [
            f"{each['heavy_share']:.1f}",
            *_interval(each),
            _part_of_gain(each["heavy_share"], document["curves"]),
        ]
        for each in found
    ]
    rows.append(["mean", *_interval(mean), ""])
    verdict = "is not shown to be better than chance"
    if mean["high"] < 0:
        verdict = "is better than chance"
    elif mean["low"] > 0:
        verdict = "is worse than chance"
    better = sum(each["high"] < 0 for each in found)
    heads = ["heavy share", "judge less random", "95 % interval", "part of the oracle's gain"]
    explained = (
        f"In the mean over these shares the judge {verdict}; it is better at {better} of {len(found)} of them, "
        "each looked at alone. The intervals are paired: each bootstrap draws the same requests and images for "
        "both. The last column is what the judge gains over chance, as a part of what the oracle that "
        "knows the error gains."
    )
    return f"{explained}\n\n{_table(heads, rows)}"


def _interval(found: Mapping[str, float]) -> list[str]:
    return [f"{found['value']:+.2f}", f"{found['low']:+.2f} to {found['high']:+.2f}"]


def _part_of_gain(share: float, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The judge's gain over chance beside that of the oracle which knows the error; "-" where that has none."""
    at = {
        rule: next(each["frechet"] for each in points if each["heavy_share"] == share)
        for rule, points in curves.items()
    }
    gain = at[RANDOM] - at[ERROR_ORACLE]
    return f"{(at[RANDOM] - at[JUDGE]) / gain:.0%}" if gain > 0 else "-"


_JUDGED = {
    "auc_real_light": "AUC, a real image above a light one",
    "auc_real_heavy": "AUC, a real image above a heavy one",
    "auc_heavy_light": "AUC, a heavy image above a light one",
    "auc_right_wrong_class": "AUC, a light image of the right class above one of another",
    "wrong_class": "light images of another class than was asked for",
    "correlation_error": "rank correlation of a light image's score and its distance to the heavy one",
    "correlation_confidence": "rank correlation of a light image's score and the classifier's confidence",
    "correlation_heavy_score": "rank correlation of the scores of both images of a request",
    "median_light": "median score of light images",
    "median_heavy": "median score of heavy images",
    "median_real": "median score of real images",
}


def _on_the_judge(found: Mapping[str, float]) -> str:
    rows = [[text, f"{found[key]:.3g}"] for key, text in _JUDGED.items()]
    return (
        f"What the judge knows:\n\n{_table(['of held-out images and of requests', 'value'], rows)}"
    )


def _times(exec_ns: Mapping[str, Mapping[Any, int]]) -> str:
    batches = list(exec_ns["light"])
    rows = [[name, *(f"{found[b] / 1e6:.2f}" for b in batches)] for name, found in exec_ns.items()]
    heads = ["exec ms of a batch of", *map(str, batches)]
    return f"Times on the machine that made this report, the least of several:\n\n{_table(heads, rows)}"


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------ live runs

#: Columns of the table of live runs.
SERVED_HEADINGS = (
    "policy",
    "violations",
    "light",
    "forced",
    "Frechet distance (digits)",
    "accuracy",
    "p50 ms",
    "p99 ms",
)


def served_row(policy: str, found: Mapping[str, Any]) -> list[str]:
    """One run, as `kept.worth` has it, under SERVED_HEADINGS."""
    distance = "-"
    if "frechet" in found:
        distance = f"{found['frechet']:.2f} +- {found['frechet_error']:.2f}"
    latency = [found["latency_ms"][key] for key in ("p50", "p99")]
    return [
        policy,
        f"{found['violation_ratio']:.4f}",
        f"{found['light_share']:.3f}",
        f"{found['forced_share']:.3f}",
        distance,
        f"{100 * found['accuracy']:.1f} %" if "accuracy" in found else "-",
        *("-" if each is None else f"{each:.0f}" for each in latency),
    ]


def served_text(document: Mapping[str, Any]) -> str:
    """The report of live runs as Markdown, of the document that `serve` writes."""
    runs = document["policies"]
    rows = [served_row(policy, found) for policy, found in runs.items()]
    compared = sum(found["compared"] for found in runs.values())
    largest = max(found["largest_difference"] for found in runs.values())
    answers = max((found.get("frechet_answers", 0) for found in runs.values()), default=0)
    late = max(found["send_late_ms_p99"] for found in runs.values())
    distances = "There are too few answers for distances."
    if answers:
        distances = (
            f"Distances are of {answers} answers in time of each run, as many of each class, to the held-out "
            "images, and means of 20 draws; FID has other features."
        )
    text = (
        f"{document['requests']} requests in {document['duration_s']:g} s, to {document['workers']} workers on "
        f"the CPU (one thread each) with an SLO of {document['slo_ns'] / NS_PER_MS:g} ms, the same for each "
        f"policy. The rate rises from a fifth of {document['peak_per_s']:.1f}/s to that and falls again; the "
        f"peak is {document['peak']:g} of what the workers answer with the heavy program alone in batches of 8 "
        f"({document['capacity_per_s']:.1f}/s, by the times of the cascade's file). Violations are requests "
        "without an answer in time by the controller's clock; light and forced are shares of all answers. "
        f"{distances} Answers computed again by a direct forward of the same program: {compared}; the largest "
        f"difference of a pixel is {largest:.1g}. 99 % of the sends were at most {late:.1f} ms late."
    )
    return f"# The cascade of digits, served\n\n{text}\n\n{_table(SERVED_HEADINGS, rows)}\n"
