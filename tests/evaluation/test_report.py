"""The report, from files whose figures are known."""

import csv
import json

import numpy as np
import pytest

from motionrag.evaluation.report import write_report

CHECKS = {
    "judge_accuracy": 0.8,
    "still_error": {"seen": 25.0},
    "tracker_error": 0.3,
    "tracker_error_median": 0.2,
    "reconstruction_error": 1.0,
    "reconstruction_error_median": 0.9,
    "reconstruction_psnr": 30.0,
}
ERRORS = {"a": 20.0, "b-k9-text-wrong0": 16.0, "c-k9-text-wrong0": 14.0, "d-k9-text-wrong0": 8.0, "e": 4.0}
QUERIES = 10


def write(folder, condition, seed, errors, *, family="fall", moves_like="fall", precision=""):
    rows = [
        {
            "query": query,
            "family": family,
            "track_error": error,
            "moves_like": moves_like,
            "lost": 0,
            "psnr": 30,
            "colour_kept": 1,
            "shape_kept": 0.9,
            "abstained": 0,
            "precision": precision,
        }
        for query, error in errors.items()
    ]
    file = folder / "clips" / f"seen_{condition}_seed{seed}.csv"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    positions = np.zeros((len(errors), 1, 17, 2), np.float32)
    positions[..., 0] = seed * 6.4
    np.save(file.with_suffix(".npy"), positions)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    for condition, error in ERRORS.items():
        for seed in range(2):
            # The seeds of a query differ, their mean is the query's figure.
            write(tmp_path, condition, seed, {query: error + query + 2 * seed - 1 for query in range(QUERIES)})
    # A side condition on two queries and one seed.
    write(tmp_path, "d-k1-text-wrong0", 0, {0: 9.0, 5: 14.0}, moves_like="orbit", precision="0.5")
    return tmp_path


def report(folder):
    return write_report(folder, columns=["seen"], settings={"trained": True}, checks=CHECKS, seconds=1.0)


def test_figures_of_the_main_rows(folder):
    rows = report(folder).summary["main"]["seen"]
    assert list(rows) == list(ERRORS)
    cama = rows["d-k9-text-wrong0"]
    assert cama["track_error"][0] == pytest.approx(8 + 4.5)
    assert cama["gain"][0] == pytest.approx(12 / 24.5)
    assert cama["share_of_ceiling"][0] == pytest.approx(12 / 16)
    assert cama["share_of_ceiling"] == pytest.approx((0.75, 0.75, 0.75))  # paired: the spread of queries cancels
    assert (cama["clips"], cama["queries"]) == (20, 10)
    assert cama["diversity"] == pytest.approx(10)
    assert rows["e"]["share_of_ceiling"][0] == pytest.approx(1)
    assert rows["a"]["gain"] == pytest.approx((0, 0, 0))


def test_cama_is_compared_with_unadapted_tokens_query_by_query(folder):
    """All queries differ alike, so the intervals have no width, however much the queries differ from each other."""
    made = report(folder)
    assert made.summary["cama_against"]["seen"] == {"b": pytest.approx((-8, -8, -8)), "c": pytest.approx((-6, -6, -6))}
    assert "(d) less (b), query by query: -8.0 [-8.0, -8.0]; (d) less (c): -6.0 [-6.0, -6.0]." in made.table


def test_side_conditions_are_compared_with_no_retrieval_on_the_same_queries_and_noise(folder):
    side = report(folder).summary["side"]["seen"]["d-k1-text-wrong0"]
    # (a) with seed 0 has 19 and 24 for queries 0 and 5.
    assert side["no_retrieval_on_the_same"] == pytest.approx(21.5)
    assert side["gain"][0] == pytest.approx(1 - 11.5 / 21.5)
    assert side["family_accuracy"] == 0
    assert side["precision"] == 0.5
    assert "diversity" not in side


def test_a_ceiling_that_gains_nothing_has_no_share(folder):
    for seed in range(2):
        write(folder, "e", seed, dict.fromkeys(range(QUERIES), 90.0))
    made = report(folder)
    assert made.summary["main"]["seen"]["d-k9-text-wrong0"]["share_of_ceiling"] is None
    json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


def test_the_table_says_it_in_words(folder):
    made = report(folder)
    assert made.table == (folder / "report.md").read_text()
    assert "| (d) CAMA | 12.5 [" in made.table
    assert "49 % [" in made.table
    assert "75 % [75, 75]" in made.table
    assert "(d) CAMA, k = 1, by text |" in made.table
    assert "| fall | 24.5 | 20.5 | 18.5 | 12.5 | 8.5 |" in made.table
    assert "untrained" not in made.table
