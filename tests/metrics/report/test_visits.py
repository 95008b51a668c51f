"""The page shows what the curriculum chose, and what came of the prompts that came back."""

import html

import pytest
from test_build import EVIL, METRICS, Page, rollout, write

from jaxrl_llm.metrics.report.build import build, draw_charts
from jaxrl_llm.metrics.report.choice import MAX_CHARTS, choice_charts
from jaxrl_llm.metrics.report.visits import MOST_ROWS, MOST_VISITS, History, Visits


def visits_of(rows, metrics=()):
    visits = Visits()
    checked = [row | {"reward": row.get("reward")} for row in rows]
    assert list(visits.counting(checked)) == checked, "they stay as they are"
    return visits.most_visited(metrics)


def visit(step, uid, row, success, **changes):
    return [rollout(step, s, uid=uid, row=row, success=x, **changes) for s, x in enumerate(success)]


def test_a_rows_history_by_hand():
    rows = [
        *visit(1, 10, 3, [True, False]),
        *visit(1, 11, 5, [False, False]),
        *visit(4, 30, 3, [True, True]),
        # Twice in one step, by another number of its stream.
        *visit(4, 31, 3, [None, None], reward=None),
    ]
    metrics = [
        {"step": 2, "replay/task_rows": [3, 9]},
        {"step": 3, "replay/task_rows": None},
        {"step": 5, "replay/task_rows": [3, 3]},
    ]
    assert visits_of(rows, metrics) == [
        History(
            "2 + 3 =", 3, 3,
            [
                ("1", "1 of 2", 0.5), ("2", "replayed", None), ("4", "2 of 2", 1.0), ("4", "not graded", None),
                ("5", "replayed", None), ("5", "replayed", None),
            ],
            0,
        )
    ]  # fmt: skip
    # What followed a hint counts for none of them.
    behind_hints = visit(1, 10, 3, [True, True, True], hint_tokens=2)
    assert visits_of([*rows[:2], *behind_hints, *rows[2:]], metrics) == visits_of(rows, metrics)
    assert visits_of(rows[:4], metrics[2:])[0].replayed == 2, "a visit and a replay are two"
    assert visits_of(rows[:4]) == []


def test_records_without_rows_are_told_apart_by_their_prompts_and_have_rewards():
    rows = [rollout(step, s, prompt=prompt, reward=s / 2) for step in (1, 2) for prompt in "ab" for s in (0, 1)]
    assert [row[:4] for row in visits_of([*rows, rollout(3, prompt="a")])] == [
        ("a", 3, 0, [("1", "reward 0.25", None), ("2", "reward 0.25", None), ("3", "reward 1.00", None)]),
        ("b", 2, 0, [("1", "reward 0.25", None), ("2", "reward 0.25", None)]),
    ]


def test_the_table_is_short():
    rows = [
        r
        for row in range(20)
        for step in range(40 if row == 7 else 2)
        for r in visit(step, 100 * row + step, row, [True])
    ]
    found = visits_of(rows)
    assert len(found) == MOST_ROWS and found[0].sampled == 40
    assert (len(found[0].visits), found[0].left_out) == (MOST_VISITS, 40 - MOST_VISITS)
    assert found[0].visits[-1][0] == "39"


CHOICE = [
    {
        "step": step, "phase": "rl", "curriculum/share/easy": 1 - step / 4, "curriculum/share/hard": step / 4,
        "curriculum/stage": step,
    }
    for step in (1, 2, 3)
]  # fmt: skip


def test_the_curriculums_choice_is_drawn():
    charts = {chart.title: chart for chart in draw_charts(CHOICE)}
    assert list(charts) == ["curriculum: stage", "curriculum: shares of the prompts"]
    shares = charts["curriculum: shares of the prompts"]
    assert shares.filled and [(line.name, line.last) for line in shares.lines] == [
        ("curriculum/share/easy", "25%"), ("curriculum/share/hard", "75%")
    ]  # fmt: skip
    # 0.75, 0.5 and 0.25 of 142 units above 150, over steps 1 to 3.
    assert shares.lines[0].path == "M46.0 43.5L189.0 79.0L332.0 114.5L332.0 150.0L189.0 150.0L46.0 150.0Z"
    assert len(choice_charts([{f"curriculum/own_{i}": 1.0 for i in range(30)}])) == MAX_CHARTS


def test_both_are_on_the_page_and_stay_text(tmp_path):
    rows = [row | {f"curriculum/{EVIL}": 1.0, "replay/task_rows": [3]} for row in CHOICE]
    write(tmp_path / "metrics.jsonl", [*METRICS[:1], *rows])
    write(tmp_path / "rollouts.jsonl", [*visit(1, 1, 3, [True], prompt=EVIL), *visit(2, 9, 3, [False], prompt=EVIL)])
    text = build(tmp_path).read_text()
    page = Page(text)
    assert page.open == [] and "<script" not in text and "<img" not in text
    seen = html.unescape(text)
    assert "Prompts that came back" in seen and "1: 1 of 1" in seen and "2: 0 of 1" in seen and "3: replayed" in seen
    assert "curriculum: shares of the prompts" in seen


@pytest.mark.parametrize("wrong", [3, "x", ["x"], {"a": 1}])
def test_replayed_rows_that_are_no_numbers_are_left_out_and_named(tmp_path, caplog, wrong):
    write(tmp_path / "metrics.jsonl", [*METRICS, CHOICE[2] | {"replay/task_rows": wrong}])
    build(tmp_path)
    assert "replay/task_rows: got" in caplog.text and "want a list of whole numbers" in caplog.text
